"""Command lines: a configuration dataclass in, an exit code out.

Exit codes: 0 done, 2 the user gave something wrong (one line on standard error, no traceback), 130 interrupted; a
`main` may return others. Anything else that goes wrong is a defect and keeps its traceback.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import functools
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, ParamSpec, TypeVar

from draccus.argparsing import ArgumentParser
from draccus.utils import DecodingError, DraccusException, ParsingError
from draccus.wrappers.docstring import get_attribute_docstring

from prismatic.util.errors import UsageError

ConfigT = TypeVar("ConfigT")
ParametersT = ParamSpec("ParametersT")


def _flags_of(config_class: type, prefix: str = "") -> list[str]:
    """Names of all flags, nested ones with dots, in the order of the dataclass."""
    flags = []
    for field in dataclasses.fields(config_class):
        default = field.default_factory if field.default_factory is not dataclasses.MISSING else None
        if dataclasses.is_dataclass(default):
            flags += _flags_of(default, f"{prefix}{field.name}.")
        else:
            flags.append(prefix + field.name)
    return flags


def _unrecognized(message: str, config_class: type) -> str:
    """argparse's "unrecognized arguments: --x 1", with the closest known flag added."""
    words = message.split(":", 1)[-1].split()
    unknown = next((word for word in words if word.startswith("--")), words[0] if words else "")
    close = difflib.get_close_matches(unknown.lstrip("-").split("=")[0], _flags_of(config_class), n=1)
    hint = f" (did you mean --{close[0]}?)" if close else ""
    return f"{unknown}: unknown flag{hint}; --help lists all of them"


def _one_line(error: BaseException) -> str:
    """The user's mistake behind draccus's error, as one line that names the flag."""
    cause = error.__cause__
    if isinstance(cause, ValueError | TypeError) and not isinstance(cause, DraccusException):
        if isinstance(error, DecodingError) and error.key_path:
            return f"--{'.'.join(error.key_path)}: {' '.join(str(error.message).split())}"
        return " ".join(str(cause).split())
    if isinstance(error, DecodingError) and error.key_path:
        return f"--{'.'.join(error.key_path)}: {' '.join(str(error.message).split())}"
    return " ".join(str(error).split())


def _describe_inherited_flags(parser: argparse.ArgumentParser, config_class: type) -> None:
    """Give each flag the comment beside its field; draccus reads those of `config_class` itself, not of its bases."""
    for action in parser._actions:
        for owner in config_class.__mro__:
            if action.dest in getattr(owner, "__annotations__", {}) and not (action.help or "").strip():
                action.help = get_attribute_docstring(owner, action.dest).comment_inline
        if action.help:
            # argparse formats help texts with %.
            action.help = action.help.replace("%", "%%").replace("%%(", "%(")


def parse(config_class: type[ConfigT], argv: Sequence[str] | None = None) -> ConfigT:
    """Parse `argv` (default: the process's) into `config_class`; `--config_path FILE` reads YAML first.

    Raises:
        UsageError: an unknown flag or a value of the wrong type, or the dataclass refused the values.
    """

    def refuse(message: str) -> NoReturn:
        raise UsageError(_unrecognized(message, config_class) if "unrecognized" in message else message)

    parser = ArgumentParser(config_class)
    parser.parser.error = refuse  # type: ignore[method-assign]
    _describe_inherited_flags(parser.parser, config_class)
    try:
        return parser.parse_args(argv)
    except (DecodingError, ParsingError, DraccusException) as error:
        raise UsageError(_one_line(error)) from error
    except FileNotFoundError as error:
        raise UsageError(f"--config_path: no such file: {error.filename}") from error


def exit_code(main: Callable[ParametersT, int | None]) -> Callable[ParametersT, int]:
    """Decorate a `main` so that it returns its exit code (None counts as 0), also after a mistake of the user's."""

    @functools.wraps(main)
    def guarded(*args: ParametersT.args, **kwargs: ParametersT.kwargs) -> int:
        if not sys.stderr.isatty():
            # In a log, the bars that transformers draws while it loads and saves are lines upon lines.
            os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        try:
            return main(*args, **kwargs) or 0
        except UsageError as error:
            if int(os.environ.get("RANK", "0")) == 0:
                print(f"error: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130

    return guarded


def run(config_class: type[ConfigT], main: Callable[[ConfigT], Any], argv: Sequence[str] | None = None) -> NoReturn:
    """Parse the command line, call `main(config)` and leave the process with its exit code."""
    sys.exit(exit_code(lambda: main(parse(config_class, argv)))())
