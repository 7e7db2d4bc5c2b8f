"""Command lines: a configuration dataclass in, an exit code out.

Exit codes: 0 done, 2 the user gave something wrong (one line on standard error, no traceback), 130 interrupted; a
`main` may return others. Anything else that goes wrong is a defect and keeps its traceback.

Not obvious: draccus prints the help, but would read every value as YAML, which turns a run called 007 into 7, 12:30
into 750 and null into None. Here a value is read by its flag's type, and text is taken as it was typed.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import dataclasses
import difflib
import errno
import functools
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, ParamSpec, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from prismatic.util.errors import UsageError, one_line, unknown_name
from prismatic.util.flags import check, declared, describe_bounds, split_names, within

ConfigT = TypeVar("ConfigT")
ParametersT = ParamSpec("ParametersT")
# Whatever a program does, these are of the path that it was given. A missing file may be a defect.
_REFUSED_PATHS = (
    errno.ENAMETOOLONG,
    errno.ELOOP,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.EACCES,
    errno.EROFS,
    errno.ENOSPC,
    errno.EDQUOT,
)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NULLS = ("~", "null", "Null", "NULL", "")
_BOOLS = {"true": True, "false": False}
_ACCEPTED = {int: "a whole number", float: "a number", bool: "True or False", Path: "a path"}


class CommandParser(argparse.ArgumentParser):
    """argparse for commands with words beside flags; its complaints are a :class:`UsageError`."""

    def error(self, message: str) -> NoReturn:
        choice = re.match(r"argument (\S+): invalid choice: '(.*)' \(choose from (.*)\)", message)
        if choice:
            raise unknown_name(choice[1], choice[2], re.findall(r"[\w.-]+", choice[3]))
        raise UsageError(f"{message}; --help lists what is accepted")


def whole_number(least: int, most: int | None = None) -> Callable[[str], int]:
    """argparse's `type` of a whole number in a range."""

    def read(text: str) -> int:
        limits = {"least": least} if most is None else {"least": least, "most": most}
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if not within(value, limits):
            raise argparse.ArgumentTypeError(f"{text[:40]!r} found; accepted: {describe_bounds(limits)}")
        return value

    return read


class _Null(str):
    """A configuration file's null, as it was written."""


class _TypedLoader(yaml.SafeLoader):
    """YAML whose values stay the text that was typed; the flags' types are applied to it later."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - as in the base class
        first: [(tag, pattern) for tag, pattern in resolvers if tag.endswith((":null", ":merge"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_TypedLoader.add_constructor("tag:yaml.org,2002:null", lambda loader, node: _Null(node.value))


def _read_file(path: str) -> dict[str, Any]:
    """Values of a configuration file (YAML, JSON or TOML), numbers and switches as text."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        if path.endswith(".toml"):
            import toml

            content = json.loads(json.dumps(toml.loads(text)), parse_int=str, parse_float=str)
        elif path.endswith(".json"):
            content = json.loads(text, parse_int=str, parse_float=str)
        else:
            content = yaml.load(text, _TypedLoader)
            json.dumps(content, default=str, skipkeys=True)  # Refuses what holds itself.
    except OSError as error:
        raise UsageError(f"--config_path: {path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise UsageError(f"--config_path: {path} is not valid: {one_line(error)}") from error
    if content is None or isinstance(content, _Null):
        return {}
    if not isinstance(content, dict):
        raise UsageError(f"--config_path: {path} holds no flags; accepted: lines such as batch_size: 8")
    return content


def _read(flag: str, kind: Any, raw: Any) -> Any:
    """`raw`, text or what a configuration file has, as a value of the type `kind`."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return _read_union(flag, parts, raw)
    if kind is Any:
        return raw
    if dataclasses.is_dataclass(kind) and isinstance(raw, dict):
        return _build(kind, raw, f"{flag.removeprefix('--')}.")  # type: ignore[arg-type]
    if kind is str:
        return _as_text(raw)
    if origin is dict:
        try:
            mapping = dict(yaml.load(raw, _TypedLoader) if isinstance(raw, str) else raw)
        except (ValueError, TypeError, yaml.YAMLError):
            raise UsageError(f"{flag}: {raw!r} found; accepted: a mapping, as in {{name: value}}") from None
        return {_read(flag, parts[0], key): _read(flag, parts[1], value) for key, value in mapping.items()}
    if origin in (tuple, list):
        entries = split_names(raw) if isinstance(raw, str) else raw
        return origin(_read(flag, parts[0], entry) for entry in entries)
    return _read_scalar(flag, kind, _as_text(raw))


def _read_union(flag: str, parts: Sequence[Any], raw: Any) -> Any:
    nothing = raw is None or isinstance(raw, _Null) or (str not in parts and str(raw).lower() in ("null", "none"))
    if nothing and NoneType in parts:
        return None
    *others, last = sorted((part for part in parts if part is not NoneType), key=lambda part: part is str)
    for part in others:
        with contextlib.suppress(UsageError):
            return _read(flag, part, raw)
    return _read(flag, last, raw)


def _as_text(raw: Any) -> str:
    if isinstance(raw, list | tuple):
        return ",".join(_as_text(entry) for entry in raw)
    return str(raw) if isinstance(raw, str) else json.dumps(raw)


def _read_scalar(flag: str, kind: Any, text: str) -> Any:
    if get_origin(kind) is Literal:
        value = next((choice for choice in get_args(kind) if str(choice) == text), None)
        if value is None:
            raise unknown_name(flag, text, map(str, get_args(kind)))
        return value
    try:
        return _BOOLS[text.lower()] if kind is bool else kind(text)
    except (ValueError, KeyError, TypeError):
        raise UsageError(f"{flag}: {text!r} found; accepted: {_ACCEPTED.get(kind, kind.__name__)}") from None


def _build(config_class: type[ConfigT], values: dict[str, Any], prefix: str = "") -> ConfigT:
    """The dataclass from raw values by flag."""
    kinds = get_type_hints(config_class)
    fields = {field.name: field for field in dataclasses.fields(config_class)}  # type: ignore[arg-type]
    for name in values:
        if name not in fields:
            raise UsageError(f"--config_path: {_unknown_flag(prefix + name, list(fields))}")
    for name, field in fields.items():
        if name not in values and field.default is field.default_factory is dataclasses.MISSING:
            raise UsageError(f"--{prefix}{name}: not given; accepted: {_ACCEPTED.get(kinds[name], 'a value')}")
    return config_class(**{name: _read(f"--{prefix}{name}", kinds[name], raw) for name, raw in values.items()})


def _unknown_flag(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word.lstrip("-").split("=")[0], known, n=1)
    hint = f" (did you mean --{close[0]}?)" if close else ""
    return f"{word}: unknown flag{hint}; --help lists all of them"


def _print_help(config_class: type) -> None:
    """Flags with defaults and the comments beside their fields, as draccus reads them from the source."""
    from draccus.argparsing import ArgumentParser
    from draccus.wrappers.docstring import get_attribute_docstring, get_preferred_help_text

    parser = ArgumentParser(config_class).parser
    for action in parser._actions:
        # draccus finds the comments beside fields of `config_class` itself, not of its bases.
        for owner in config_class.__mro__:
            if action.dest in getattr(owner, "__annotations__", {}) and not (action.help or "").strip():
                action.help = get_preferred_help_text(get_attribute_docstring(owner, action.dest))
        if action.help:
            # argparse formats help texts with %.
            action.help = action.help.replace("%", "%%").replace("%%(", "%(")
    parser.print_help()


def _given_flags(config_class: type, argv: Sequence[str]) -> dict[str, str]:
    """The flags of the command line with their text: --flag VALUE or --flag=VALUE; a value may begin with a dash."""
    known = ["config_path", *(name for name, _, _ in declared(config_class))]
    flags = {f"--{name}" for name in known}
    given: dict[str, str] = {}
    words = iter(argv)
    for word in words:
        flag, equals, value = word.partition("=")
        if flag not in flags:
            raise UsageError(_unknown_flag(word, known))
        if not equals:
            value = next(words, flag)
            if value.partition("=")[0] in flags:
                raise UsageError(f"{flag}: no value given; accepted: {flag} VALUE")
        given[flag.removeprefix("--")] = value
    return given


def parse(config_class: type[ConfigT], argv: Sequence[str] | None = None) -> ConfigT:
    """Read `argv` (default: the process's) into `config_class`; `--config_path FILE` gives values beneath them.

    The file is YAML, JSON or TOML. A flag given twice has its last value. Raises UsageError: an unknown flag, a value
    of the wrong type or outside its limits, or the dataclass refused it.
    """
    argv = sys.argv[1:] if argv is None else argv
    if "-h" in argv or "--help" in argv:
        _print_help(config_class)
        sys.exit(0)
    given = _given_flags(config_class, argv)
    values = _read_file(path) if (path := given.pop("config_path", None)) else {}
    for flag, text in given.items():
        group = values
        *parents, name = flag.split(".")
        for parent in parents:
            group = group.setdefault(parent, {})
        group[name] = text
    config = _build(config_class, values)
    check(config)
    return config


def _path_trouble(error: Exception) -> str | None:
    """Say what the operating system refuses, a path or a write, and why; None for errors that are not of that kind."""
    if isinstance(error, OSError) and error.errno in _REFUSED_PATHS and error.filename:
        return f"{error.filename}: {error.strerror}; accepted: another path"
    said = one_line(error)
    # Of a write, which knows no path; writers in Rust raise no OSError.
    if getattr(error, "errno", None) in _FULL or re.search(rf"os error ({'|'.join(map(str, _FULL))})\b", said):
        return f"nothing more can be written ({said[:160]}); accepted: a place with room"
    # pathlib's own, for a loop of links and for ~nobody.
    if type(error) is RuntimeError and said.startswith(("Symlink loop", "Could not determine home")):
        return f"a path leads nowhere: {said}; accepted: another path"
    return None


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
        except Exception as error:
            trouble = _path_trouble(error)
            if trouble is None:
                raise
            print(f"error: {trouble}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130

    return guarded


def run(config_class: type[ConfigT], main: Callable[[ConfigT], Any], argv: Sequence[str] | None = None) -> NoReturn:
    """Parse the command line, call `main(config)` and leave the process with its exit code."""
    leave(exit_code(lambda: main(parse(config_class, argv)))())


def leave(code: int) -> NoReturn:
    """End the process with `code`; a process of a launch of several runs what is registered for its end, no more.

    Threads of gloo outlive FSDP2's groups, also destroyed ones. If one of them needs the interpreter while that shuts
    down, the process aborts, and a run that is done counts as failed (torch 2.14, Python 3.11: 2 of 25 launches).
    """
    if int(os.environ.get("WORLD_SIZE") or 1) == 1:
        sys.exit(code)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
