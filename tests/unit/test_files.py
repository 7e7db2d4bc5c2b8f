"""Atomic writes: the old file or the whole new one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from prismatic.util.errors import UsageError
from prismatic.util.files import atomic_path, atomic_write, longest_name, refuse_long_name, temporary_prefix


def test_creates_parents_and_replaces(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b.json"
    atomic_write(target, "one")
    atomic_write(target, b"two")
    assert target.read_text() == "two"
    assert [path.name for path in target.parent.iterdir()] == ["b.json"]


def test_a_failed_write_leaves_the_old_file_alone(tmp_path: Path) -> None:
    target = tmp_path / "kept.txt"
    atomic_write(target, "old")
    with pytest.raises(RuntimeError, match="halfway"), atomic_path(target) as temporary:
        temporary.write_text("new, but")
        raise RuntimeError("halfway")
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_names_near_the_longest_are_written_and_longer_ones_refused(tmp_path: Path) -> None:
    longest = os.pathconf(tmp_path, "PC_NAME_MAX")
    assert longest_name(tmp_path / "not" / "yet") == longest
    for name in (f"{'n' * (longest - 5)}.json", "\u00e9" * (longest // 2), f"n.{'s' * (longest - 2)}"):
        refuse_long_name("--out", tmp_path / name)
        atomic_write(tmp_path / name, "1")
        assert (tmp_path / name).read_text() == "1"
    with pytest.raises(UsageError, match=rf"--out: a name of {longest + 1} bytes .* at most {longest}"):
        refuse_long_name("--out", tmp_path / ("n" * (longest + 1)))


def test_folders_that_differ_after_a_dot_have_temporary_names_of_their_own() -> None:
    names = ["m+lr-0.0005+dropout-0.0--note--100_chkpt", "m+lr-0.0005+dropout-0.0--other--100_chkpt", "m+lr-0.0005"]
    assert len({temporary_prefix(Path(name)) for name in names}) == 3
