"""Who may ask: a token compared in constant time, and no web pages."""

from __future__ import annotations

import base64
import binascii
import contextlib
import functools
import hmac
import ipaddress
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

from prismatic.util.errors import UsageError

TOKEN_VARIABLE = "POLICY_SERVER_TOKEN"
_SCHEMES = ("bearer", "api-key")  # Api-Key: openpi's clients


def read_token(token_file: str) -> str | None:
    """The token in the file, else in POLICY_SERVER_TOKEN, else None: none is needed. Raises UsageError: a bad one."""
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

    Browsers always send `Origin`, other clients may; then it is the server's own address. Refusing others keeps web
    pages that the user has open away from a server on this machine.
    """
    origin = headers.get("origin")
    if origin is not None and not _is_own(origin, headers.get("host", ""), token):
        return (
            403,
            f"header Origin: found {origin[:80]!r}, a page of another host; accepted: the server's own address",
        )
    if token is None:
        return None
    scheme, _, given = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "basic":
        scheme, given = "bearer", _password(given)
    if scheme.lower() not in _SCHEMES or not hmac.compare_digest(given.strip().encode(), token.encode()):
        return 401, "a token is needed: header 'Authorization: Bearer TOKEN'"
    return None


def _is_own(origin: str, host: str, token: str | None) -> bool:
    """Tell whether an `Origin` is the address that the request went to (header Host).

    A page whose name was made to point here (DNS rebinding) sends the same name in both. Without a token that it does
    not know, only numbers and this machine's names are therefore taken for its address.
    """
    try:
        page, own = urlsplit(origin), urlsplit(f"//{host}")
        usual = 443 if page.scheme == "https" else 80
        same = page.hostname == own.hostname and (page.port or usual) == (own.port or usual)
    except ValueError:
        return False
    if page.scheme not in ("http", "https") or not page.hostname or not same:
        return False
    if token is not None or page.hostname in ("localhost", *_own_names()):
        return True
    with contextlib.suppress(ValueError):
        return bool(ipaddress.ip_address(page.hostname))
    return False


@functools.cache
def _own_names() -> tuple[str, ...]:
    return socket.gethostname().lower(), socket.getfqdn().lower()


def _password(credentials: str) -> str:
    """The password of HTTP's Basic scheme, which clients that cannot set headers send for ws://any:TOKEN@host."""
    try:
        return base64.b64decode(credentials.strip(), validate=True).decode("utf-8").partition(":")[2]
    except (binascii.Error, UnicodeDecodeError):
        return ""
