"""What is missing is named by package, and the line that installs it is printed instead of run for ordinary users."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from experiments.robot.libero import system_libraries
from tests.helpers.programs import run_program


def test_a_library_that_does_not_exist_does_not_load() -> None:
    assert not system_libraries.loads("librocket-vla-no-such-library.so.1")


def test_missing_packages_are_listed_once_and_renderer_needs_a_working_device(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = {"libglib-2.0.so.0", "libgthread-2.0.so.0", "libOSMesa.so.8", "libOSMesa.so.6", "libOSMesa.so"}
    monkeypatch.setattr(system_libraries, "loads", lambda name: name not in absent)
    monkeypatch.setattr(system_libraries, "egl_opens", lambda: False)
    assert system_libraries.missing_packages() == ["libglib2.0-0", "libegl1", "libegl-mesa0", "libgl1-mesa-dri"]

    monkeypatch.setattr(system_libraries, "egl_opens", lambda: True)
    assert system_libraries.missing_packages() == ["libglib2.0-0"]


def test_an_ordinary_user_gets_the_line_to_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(system_libraries, "missing_packages", lambda: ["libegl1"])
    monkeypatch.setattr(system_libraries.os, "geteuid", lambda: 1000)
    monkeypatch.setattr(system_libraries, "install", lambda packages: pytest.fail("must not install"))
    monkeypatch.setattr(sys, "argv", ["system_libraries.py", "--install"])
    assert system_libraries.main() == 1
    error = capsys.readouterr().err
    assert error.strip().count("\n") == 0
    assert "apt-get update && apt-get install -y libegl1" in error


def test_runs_as_a_file_with_the_standard_library_alone() -> None:
    # -I -S: no site-packages, as before the environment exists.
    path = Path(system_libraries.__file__)
    done = run_program([sys.executable, "-I", "-S", str(path), "--help"])
    assert done.returncode == 0, done.stderr
    assert "--install" in done.stdout
