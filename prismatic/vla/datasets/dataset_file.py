"""Datasets of a user's own, described by a JSON or YAML file (`--dataset_file`): which features are what.

    {"my_data": {"images": {"front": "observation/cam_front"}, "action": "action", "state": null}}

Every entry is the name of a folder below `--data_root_dir`, in RLDS or LeRobot format, and a :class:`DatasetSpec`.
Actions and states are a feature, or a list of parts that are joined: a feature, some of its columns ("action[:6]",
"action[-1]"), a number, or {"columns": ..., "operations": [...]}. An entry wins over what is built in under its name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from prismatic.util.errors import UsageError
from prismatic.util.files import read_mapping
from prismatic.vla.datasets.oxe.operations import Assembly, Columns, Constant, Operation, Part
from prismatic.vla.datasets.specs import DATASETS, MIXTURES, DatasetSpec

_FIELDS = ("images", "action", "state", "language", "action_mask", "delta", "drop_first", "drop_last")
_COLUMNS = re.compile(r"(?P<feature>[^\[\]]+)(\[((?P<start>-?\d*):(?P<stop>-?\d*)|(?P<index>-?\d+))\])?")
_OPERATIONS = {operation.value: operation for operation in Operation}


class _Entry:
    """One dataset of the file, and what to say of its mistakes."""

    def __init__(self, place: str, content: object) -> None:
        self.place = place
        if not isinstance(content, Mapping):
            self.refuse("the entry", content, "an object with " + ", ".join(_FIELDS))
        unknown = sorted(str(name) for name in content if name not in _FIELDS)
        if unknown:
            self.refuse("field", unknown[0], ", ".join(_FIELDS))
        self.content: Mapping[str, object] = content

    def refuse(self, what: str, value: object, accepted: str) -> NoReturn:
        raise UsageError(f"{self.place}: {what}: {value!r} found; accepted: {accepted}")

    def spec(self) -> DatasetSpec:
        """The specification that the entry describes."""
        action = self._parts("action", self.content.get("action", "action"))
        state = self._parts("state", self.content.get("state", "observation/state"))
        images, mask, delta = self._images(), self._mask("action_mask"), self._mask("delta")
        language = self.content.get("language", "language_instruction")
        if not isinstance(language, str) or not language:
            self.refuse("language", language, "the name of a feature")
        drops = {name: self._count(name) for name in ("drop_first", "drop_last")}
        if not action:
            self.refuse("action", self.content["action"], "a feature, or a list of parts")
        whole = all(isinstance(part, Columns) and part == Columns(part.feature) for part in (*action, *state))
        if whole and len(action) == 1 and len(state) <= 1 and not any(drops.values()):
            names = [part.feature for part in (*action, *state) if isinstance(part, Columns)]
            state_name = names[1] if state else None
            spec = DatasetSpec(images=images, action=names[0], state=state_name, language=language)
            return replace(spec, action_mask=mask, delta=delta)
        assembly = Assembly(action, state, **drops)
        return DatasetSpec(images=images, language=language, action_mask=mask, delta=delta, assembly=assembly)

    def _images(self) -> dict[str, str | None]:
        images = self.content.get("images")
        accepted = 'a camera\'s name and feature each, such as {"front": "observation/cam_front"}'
        if not isinstance(images, Mapping) or not images:
            self.refuse("images", images, accepted)
        for view, feature in images.items():
            if not isinstance(view, str) or not (feature is None or (isinstance(feature, str) and feature)):
                self.refuse("images", {view: feature}, accepted)
        return dict(images)

    def _mask(self, name: str) -> tuple[bool, ...] | None:
        mask = self.content.get(name)
        if mask is not None and not (isinstance(mask, list) and all(isinstance(value, bool) for value in mask)):
            meaning = {"action_mask": "normalized", "delta": "counted from the state"}[name]
            self.refuse(name, mask, f"a list of true ({meaning}) and false, one for each number of an action")
        return None if mask is None else tuple(mask)

    def _count(self, name: str) -> int:
        count = self.content.get(name, 0)
        if not isinstance(count, int) or isinstance(count, bool) or count < 0:
            self.refuse(name, count, "how many steps at an episode's end are no transitions")
        return count

    def _parts(self, field: str, value: object) -> tuple[Part, ...]:
        if value is None:
            return ()
        return tuple(self._part(field, part) for part in (value if isinstance(value, list) else [value]))

    def _part(self, field: str, value: object) -> Part:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return Constant(float(value))
        if isinstance(value, Mapping) and set(value) == {"columns", "operations"}:
            columns, names = self._part(field, value["columns"]), value["operations"]
            unknown = [name for name in names if name not in _OPERATIONS] if isinstance(names, list) else [names]
            if unknown or not isinstance(columns, Columns):
                accepted = f"a list of {', '.join(_OPERATIONS)}, of a feature's columns"
                self.refuse(f"{field}: operations", names, accepted)
            return columns.then(*(_OPERATIONS[name] for name in names))
        match = _COLUMNS.fullmatch(value) if isinstance(value, str) else None
        if match is None:
            self.refuse(field, value, 'a feature, "feature[start:stop]", a number, or {"columns", "operations"}')
        columns = Columns(match["feature"])
        if match["index"]:
            first = int(match["index"])
            return columns[first : first + 1 or None]
        return columns[int(match["start"]) if match["start"] else None : int(match["stop"]) if match["stop"] else None]


def fits_as_name(name: object) -> bool:
    """Tell whether a dataset can be called so: a folder's name that --dataset_name takes for no list or mixture."""
    if not isinstance(name, str) or name != name.strip() or name in ("", ".", "..", *MIXTURES):
        return False
    return not set(name) & set(",:/\0")


def read_datasets(path: Path) -> dict[str, DatasetSpec]:
    """The datasets that a file describes.

    Raises UsageError: no such file, or the first mistake in it; names the dataset and the field.
    """
    content = read_mapping(path)
    for name in content:
        if not fits_as_name(name):
            raise UsageError(
                f"{path}: dataset {name!r}; accepted: the name of a folder, without , : /, that is no mixture's"
            )
    return {name: _Entry(f"{path}: dataset {name!r}", entry).spec() for name, entry in content.items()}


def register_datasets(path: Path) -> None:
    """Make the datasets of a file known under their names. Raises UsageError as :func:`read_datasets`."""
    DATASETS.update(read_datasets(path))
