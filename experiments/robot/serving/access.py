"""Who may ask: a token compared in constant time, and no web pages."""

from __future__ import annotations

import base64
import binascii
import hmac
import os
from collections.abc import Mapping
from pathlib import Path

from prismatic.util.errors import UsageError

TOKEN_VARIABLE = "POLICY_SERVER_TOKEN"
_SCHEMES = ("bearer", "api-key")  # Api-Key: openpi's clients


def read_token(token_file: str) -> str | None:
    """The token in the file, else in the environment variable POLICY_SERVER_TOKEN, else None: no token is asked for.

    Raises:
        UsageError: the file cannot be read, or the token is empty or no plain ASCII.
    """
    if token_file:
        source = f"--token_file: {token_file}"
        try:
            token = Path(token_file).expanduser().read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"{source}: cannot be read ({getattr(error, 'strerror', None) or 'not text'})") from None
    elif TOKEN_VARIABLE in os.environ:
        source, token = f"environment variable {TOKEN_VARIABLE}", os.environ[TOKEN_VARIABLE].strip()
    else:
        return None
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise UsageError(f"{source}: holds no token; accepted: one line of ASCII characters without blanks")
    return token


def refusal(headers: Mapping[str, str], token: str | None) -> tuple[int, str] | None:
    """(HTTP status, reason) when a request with these headers may not be served, else None.

    Browsers send `Origin`; robots do not. Refusing it keeps web pages that the user has open away from a server on
    this machine.
    """
    if "origin" in headers:
        return 403, "requests of web pages (header Origin) are not served"
    if token is None:
        return None
    scheme, _, given = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "basic":
        scheme, given = "bearer", _password(given)
    if scheme.lower() not in _SCHEMES or not hmac.compare_digest(given.strip().encode(), token.encode()):
        return 401, "a token is needed: header 'Authorization: Bearer TOKEN'"
    return None


def _password(credentials: str) -> str:
    """The password of HTTP's Basic scheme, which clients that cannot set headers send for ws://any:TOKEN@host."""
    try:
        return base64.b64decode(credentials.strip(), validate=True).decode("utf-8").partition(":")[2]
    except (binascii.Error, UnicodeDecodeError):
        return ""
