"""The one exception type that means "the user gave something wrong", as opposed to a defect of ours."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UsageError(ValueError):
    """A wrong flag, file or combination. The message is one line: what was given, what was found, what is accepted.

    Command-line entry points print it without a traceback and exit with code 2.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.splitlines()))  # A library's reason within it may have several.


def did_you_mean(name: str, accepted: Iterable[str]) -> str:
    """ " (did you mean 'NAME'?)" for the accepted name that `name` is close to, else ""."""
    close = difflib.get_close_matches(name, list(accepted), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def unknown_name(kind: str, name: str, accepted: Iterable[str]) -> UsageError:
    """A :class:`UsageError` for `name`, none of the `accepted` names, with a "did you mean" when one is close."""
    names = sorted(name for name in accepted if name)
    return UsageError(f"{kind}: unknown value {name!r}{did_you_mean(name, names)}; accepted: {', '.join(names)}")


def one_line(error: BaseException, most: int | None = None) -> str:
    """The text of an error on one line, cut after `most` characters; its type where it says nothing."""
    return " ".join(str(error).split())[:most] or type(error).__name__
