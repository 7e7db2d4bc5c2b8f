"""rocket-align, a distribution of its own: built, put beside its requirements alone, and trained with."""

from __future__ import annotations

import json
import sys
import venv
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest
import tomllib
from packaging.requirements import Requirement

from tests.helpers.programs import run_program


@pytest.fixture(scope="module")
def wheel(repo_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    done = run_program([*command, str(repo_root / "rocket_align")])
    assert done.returncode == 0, done.stderr[-3000:]
    return next(folder.glob("rocket_align-*.whl"))


def requirements(metadata: str) -> list[Requirement]:
    """What a distribution needs here, without extras."""
    lines = [line.partition(": ")[2] for line in metadata.splitlines() if line.startswith("Requires-Dist: ")]
    listed = [Requirement(line) for line in lines]
    return [entry for entry in listed if entry.marker is None or entry.marker.evaluate({"extra": ""})]


def top_level(names: list[Requirement]) -> dict[str, Path]:
    """Files and folders in site-packages of these distributions and of all that they need."""
    paths: dict[str, Path] = {}
    pending, seen = list(names), set()
    while pending:
        name = pending.pop().name
        if name in seen:
            continue
        seen.add(name)
        installed = distribution(name)
        site = Path(str(installed.locate_file("")))
        paths |= {file.parts[0]: site / file.parts[0] for file in installed.files or () if file.parts[0] != ".."}
        pending += [Requirement(line) for line in installed.requires or () if "extra ==" not in line]
        pending = [entry for entry in pending if entry.marker is None or entry.marker.evaluate({"extra": ""})]
    return paths


def test_wheel_holds_every_module_of_the_package(wheel: Path, repo_root: Path) -> None:
    sources = {path.relative_to(repo_root).as_posix() for path in (repo_root / "rocket_align").rglob("*.py")}
    assert {name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".py")} == sources
    assert not (repo_root / "rocket_align" / "build").exists()


def test_versions_and_pythons_agree_with_the_whole(repo_root: Path) -> None:
    whole = tomllib.loads((repo_root / "pyproject.toml").read_text())["project"]
    part = tomllib.loads((repo_root / "rocket_align" / "pyproject.toml").read_text())["project"]
    assert part["version"] == whole["version"] and part["requires-python"] == ">=3.10"


def test_it_trains_with_torch_safetensors_and_numpy_alone(wheel: Path, repo_root: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith("METADATA"))
        needed = requirements(archive.read(name).decode())
        assert {entry.name for entry in needed} == {"torch", "safetensors", "numpy"}
        venv.create(tmp_path / "env", with_pip=False, symlinks=True)
        site = next((tmp_path / "env" / "lib").glob("python*/site-packages"))
        archive.extractall(site)
    for entry, path in top_level(needed).items():
        (site / entry).symlink_to(path)
    worker = repo_root / "tests" / "integration" / "align_alone_worker.py"
    command = [str(tmp_path / "env" / "bin" / "python"), "-I", str(worker)]
    teacher = repo_root / "experiments" / "mini" / "weights" / "teacher"
    done = run_program([*command, str(teacher)], cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout)
    assert report["present"] == [] and report["strategy"] == "layer"
    assert 0 < report["losses"][-1] < report["losses"][0]
