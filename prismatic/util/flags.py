"""Limits of flags, declared beside their fields, and the one check of them. Imports nothing heavy.

    scheduler: Literal["MultiStepLR", "CosineAnnealingLR"] = "MultiStepLR"
    lora_dropout: float = limited(0.0, least=0, below=1)  # Dropout on LoRA's input
    task_ids: str = numbers("", least=0)  # Takes 7,9 and [7,9] and 0-3,7
    trackers: str = names("tensorboard", choices=TRACKERS)  # Takes a,b and [a, b]
    work_dir: str = limited("", needed="a folder on a local disk")

Declarations are plain field metadata, so that a dataclass can declare without importing this module. Lists stay text in
their fields, and so in what is recorded; `split_numbers` and `split_names` read them where they are used.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from prismatic.util.errors import UsageError, unknown_name

_ALL = ("", "all", "none", "null")
_LONGEST_RANGE = 10**6
_ACCEPTED = {bool: "True or False", int: "a whole number", float: "a number"}


def limited(default: Any, **limits: Any) -> Any:
    """A field with limits: `least` and `most` belong to a number's range, `above` and `below` do not; or `choices`.

    `needed` says what to give where an empty default will not do.
    """
    return dataclasses.field(default=default, metadata=limits)


def numbers(default: str, *, some: bool = False, **limits: Any) -> Any:
    """A field for a list of whole numbers, each within `limits`; `some`: at least one."""
    return limited(default, list=int, some=some, **limits)


def names(default: str, *, some: bool = False, **limits: Any) -> Any:
    """A field for a list of names, each within `limits`; `some`: at least one."""
    return limited(default, list=str, some=some, **limits)


def split_names(text: str | Iterable[str]) -> tuple[str, ...]:
    """The names of "a,b" or "[a, b]", in order."""
    parts = _unwrapped(text).split(",") if isinstance(text, str) else map(str, text)
    return tuple(name for part in parts if (name := part.strip().strip("'\"")))


def split_numbers(flag: str, text: str | int | Iterable[int]) -> tuple[int, ...]:
    """The numbers of "7,9", "[7, 9]" or "0-3,7", in order, each once.

    Raises UsageError: something else, naming `flag`.
    """
    entries = [str(text)] if isinstance(text, int) else split_names(text if isinstance(text, str) else map(str, text))
    values: list[int] = []
    for entry in entries:
        match = re.fullmatch(r"([+-]?\d+)(?:\s*-\s*(\d+))?", entry)
        if match is None or (match[2] and not 0 <= int(match[2]) - int(match[1]) < _LONGEST_RANGE):
            raise UsageError(f"{flag}: {entry!r} found; accepted: whole numbers, as in 7,9 or 0-3,7")
        values += range(int(match[1]), int(match[2] or match[1]) + 1)
    return tuple(dict.fromkeys(values))


def choose_numbers(flag: str, text: str | int | Iterable[int], count: int) -> tuple[int, ...]:
    """Those of the numbers 0 to `count` - 1 that `text` lists; all of them for "" and "all".

    Raises UsageError: no such list, or a number outside.
    """
    if isinstance(text, str) and _unwrapped(text).lower() in _ALL:
        return tuple(range(count))
    chosen = split_numbers(flag, text)
    for number in chosen:
        if not 0 <= number < count:
            raise UsageError(f"{flag}: {number} found; accepted: 0 to {count - 1}")
    return chosen


def split_paths(text: str) -> tuple[str, ...]:
    """The paths of a comma list; a path that exists may contain commas."""
    parts = [part.strip() for part in text.split(",")]
    paths = []
    while parts:
        lengths = (n for n in range(len(parts), 1, -1) if Path(",".join(parts[:n])).expanduser().exists())
        length = next(lengths, 1)
        paths.append(",".join(parts[:length]))
        parts = parts[length:]
    return tuple(path for path in paths if path)


def _unwrapped(text: str) -> str:
    text = text.strip()
    return text[1:-1].strip() if text[:1] + text[-1:] in ("[]", "()") else text


def choices_of(kind: Any) -> tuple[Any, ...]:
    """The values of a Literal, also within an Optional; () for other types."""
    if get_origin(kind) is Literal:
        return get_args(kind)
    return next((values for part in get_args(kind) if (values := choices_of(part))), ())


def declared(config_class: type, prefix: str = "") -> Iterator[tuple[str, Any, dataclasses.Field[Any]]]:
    """(flag without dashes, type, field) of every flag, nested ones with dots, in the order of the dataclass."""
    kinds = get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        kind = kinds[field.name]
        if dataclasses.is_dataclass(kind):
            yield from declared(kind, f"{prefix}{field.name}.")  # type: ignore[arg-type]
        else:
            yield prefix + field.name, kind, field


def check(config: Any) -> None:
    """Refuse the first value outside the limits that `config`, a dataclass, declares.

    Raises UsageError: one line with the flag, what was found and what is accepted.
    """
    for name, kind, field in declared(type(config)):
        value = config
        for part in name.split("."):
            value = getattr(value, part)
        if value is not None:
            kinds = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
            numeric = next((accepted for number, accepted in _ACCEPTED.items() if number in kinds), "")
            if numeric and str not in kinds and isinstance(value, str | list | tuple | dict):  # Of a damaged record.
                raise UsageError(f"--{name}: {value!r} found; accepted: {numeric}")
            _check_value(f"--{name}", value, field.metadata, choices_of(kind))


def _check_value(flag: str, value: Any, limits: Any, literal: Sequence[Any]) -> None:
    if "needed" in limits and not value:
        raise UsageError(f"{flag}: not given; accepted: {limits['needed']}")
    entries: Sequence[Any] = (value,)
    if "list" in limits:
        everything = limits["list"] is int and isinstance(value, str) and _unwrapped(value).lower() in _ALL
        entries = () if everything else split_numbers(flag, value) if limits["list"] is int else split_names(value)
        if limits["some"] and not entries:
            raise UsageError(f"{flag}: {value!r} found; accepted: one or more, as a comma list")
    choices = literal or limits.get("choices", ())
    for entry in entries:
        if entry == "" and not literal:
            continue  # Not given.
        if choices and entry not in choices:
            if isinstance(entry, str):
                raise unknown_name(flag, entry, choices)
            raise UsageError(f"{flag}: {entry} found; accepted: {', '.join(map(str, choices))}")
        if not within(entry, limits):
            raise UsageError(f"{flag}: {entry} found; accepted: {describe_bounds(limits)}")


def within(value: Any, limits: Any) -> bool:
    """Tell whether a number lies in the declared range; not a number never does, where there is one."""
    return not (
        ("least" in limits and not value >= limits["least"])
        or ("above" in limits and not value > limits["above"])
        or ("most" in limits and not value <= limits["most"])
        or ("below" in limits and not value < limits["below"])
    )


def describe_bounds(limits: Any) -> str:
    """The declared range in words, as in "1 or more", "16 to 4096" or "above 0, at most 1"."""
    if "least" in limits and "most" in limits:
        return f"{limits['least']} to {limits['most']}"
    low = f"{limits['least']} or more" if "least" in limits else f"above {limits['above']}" if "above" in limits else ""
    if limits.get("below") == math.inf:
        return f"a finite number, {low}"
    high = f"at most {limits['most']}" if "most" in limits else f"below {limits['below']}" if "below" in limits else ""
    return ", ".join(part for part in (low, high) if part)
