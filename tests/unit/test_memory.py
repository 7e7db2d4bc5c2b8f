"""Freed memory is used again."""

from __future__ import annotations

import platform
import sys

import pytest

from tests.helpers.programs import run_program

_SCRIPT = """
import resource
import numpy as np
from prismatic.util.memory import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        arrays = [np.ones(150_000, dtype=np.float32) for _ in range(8)]
        del arrays
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
before = faults()
keep_freed_memory()
faults()
print(before, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_memory_of_an_image_is_not_asked_for_again() -> None:
    before, after = map(int, run_program([sys.executable, "-c", _SCRIPT]).stdout.split())
    assert after < 100 and after <= before  # Eight arrays of 0.6 MB are 1,200 pages, twenty times over.
