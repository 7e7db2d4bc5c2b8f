"""Freed memory: kept by the process, or given back to the system."""

from __future__ import annotations

import contextlib
import ctypes

# Names of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def keep_freed_memory() -> None:
    """Let a process that makes image after image, or takes step after step on a CPU, keep up to 256 MB that it has
    freed, for the next one.

    glibc gives the end of its heap back and asks for it again; the system then clears every page, which takes a tenth
    of the time. Other C libraries are left alone.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        library = ctypes.CDLL(None)
        library.mallopt(_M_TRIM_THRESHOLD, 2**28)
        library.mallopt(_M_MMAP_THRESHOLD, 2**25)  # The largest that it accepts.
