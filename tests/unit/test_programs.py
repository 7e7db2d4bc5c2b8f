"""The end of programs that tests start."""

from __future__ import annotations

import sys
import time

import psutil
import pytest

from tests.helpers.programs import run_program

LEAVES_A_PROCESS = (
    "import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']).pid)"
)


def test_a_process_left_behind_is_not_waited_for() -> None:
    started = time.monotonic()
    left = psutil.Process(int(run_program([sys.executable, "-c", LEAVES_A_PROCESS]).stdout))
    left.kill()
    assert time.monotonic() - started < 60


def test_a_program_without_children_tells_where_it_is() -> None:
    with pytest.raises(pytest.fail.Exception, match='File "<string>", line 1 in <module>'):
        run_program([sys.executable, "-c", "while True: pass"], timeout=3)


def test_what_does_not_end_tells_where_it_is_and_is_killed_with_its_processes() -> None:
    program = f"{LEAVES_A_PROCESS}; sys.stdout.flush()\nwhile True: pass"
    with pytest.raises(pytest.fail.Exception) as told:
        run_program([sys.executable, "-c", program], timeout=5)
    assert 'File "<string>", line 2 in <module>' in str(told.value)
    (left,) = (int(line) for line in str(told.value).splitlines() if line.isdigit())
    assert not psutil.pid_exists(left)
