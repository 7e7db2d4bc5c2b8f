"""Processes that measure one way of doing something each, and are asked in turns."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from prismatic.util.errors import UsageError

FOLDER = Path(__file__).resolve().parent


class Worker:
    """A process of a script in this folder, with the code of a checkout and one thread.

    It answers once when it is ready, and then each line on its input, by a line of JSON. Its errors are printed.

    Raises UsageError, also from :meth:`ask`: it ended instead.
    """

    def __init__(self, script: str, *arguments: str, build: Path) -> None:
        environment = {**os.environ, "PYTHONPATH": str(build), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        self._script = script
        self._process = subprocess.Popen(
            [sys.executable, str(FOLDER / script), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.first = self._answer()

    def ask(self, part: str) -> float:
        """CPU time of one run of a part."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # It has ended: there is no answer either.
            print(part, file=self._process.stdin, flush=True)
        return float(self._answer())

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        if not (line := self._process.stdout.readline()):
            raise UsageError(f"{self._script}: ended with {self._process.wait()}, see above; accepted: an answer")
        return json.loads(line)

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


def commit_of(earlier: str) -> str:
    """The commit of a checkout of this project. Raises UsageError: something else."""
    if not (Path(earlier) / "benchmarks").is_dir():
        raise UsageError(f"--earlier: {earlier} found; accepted: a checkout of this project")
    described = ["git", "-C", earlier, "rev-parse", "--short", "HEAD"]
    return subprocess.run(described, capture_output=True, text=True, check=True).stdout.strip()
