"""Programs that tests start: an end to them whatever they do, and where they were if they had to be ended."""

from __future__ import annotations

import contextlib
import signal
import subprocess
from collections.abc import Sequence
from typing import Any

import psutil
import pytest


def run_program(command: Sequence[Any], timeout: float = 600, **options: Any) -> subprocess.CompletedProcess[str]:
    """As subprocess.run, with the text of both outputs kept.

    The test fails when the program takes over `timeout` seconds. Then each of its processes prints its stacks (Python's
    fault handler is on, see conftest.py), and all are killed: those that a launcher leaves behind would slow down or
    block whatever comes next.
    """
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes, **options) as process:
        try:
            stdout, stderr = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            stdout, stderr = _end(process)
            pytest.fail(f"no end after {timeout} s: {command}\n{stdout[-4000:]}\n{stderr[-20000:]}", pytrace=False)
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


def _end(process: subprocess.Popen[str]) -> tuple[str, str]:
    """What a program that does not end has printed, its stacks included."""
    family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for name in (signal.SIGABRT, signal.SIGKILL):
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.send_signal(name)
        psutil.wait_procs(family[:-1], timeout=10)
    return process.communicate()
