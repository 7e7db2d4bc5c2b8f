"""Programs that tests start: an end to them whatever they do, and where they were if they had to be ended."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from typing import IO, Any

import psutil
import pytest


def run_program(command: Sequence[Any], timeout: float = 600, **options: Any) -> subprocess.CompletedProcess[str]:
    """As subprocess.run, with the text of both outputs kept.

    The test fails when the program takes over `timeout` seconds. Then each of its processes prints its stacks (Python's
    fault handler is on, see conftest.py), and all are killed: those that a launcher leaves behind would slow down or
    block whatever comes next. Outputs are files, since a process left behind would keep a pipe open.
    """
    with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        process = subprocess.Popen(command, stdout=stdout, stderr=stderr, **options)
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            _end(process.pid)
            process.wait()
            printed = f"{_text(stdout)[-4000:]}\n{_text(stderr)[-20000:]}"
            pytest.fail(f"no end after {timeout} s: {command}\n{printed}", pytrace=False)
        except BaseException:  # The test's own end, by Ctrl-C.
            _end(process.pid)
            raise
        return subprocess.CompletedProcess(command, process.returncode, _text(stdout), _text(stderr))


def _end(process: int) -> None:
    """Let a process and all below it print their stacks, and kill them."""
    family = [*psutil.Process(process).children(recursive=True), psutil.Process(process)]
    for number in (signal.SIGABRT, signal.SIGKILL):
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.send_signal(number)
        psutil.wait_procs(family, timeout=10)


def _text(stream: IO[bytes]) -> str:
    stream.seek(0)
    return stream.read().decode(errors="replace").replace("\r\n", "\n")
