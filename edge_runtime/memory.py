"""The memory of this process: how much it holds, and giving back what it does not need.

Why: a device has little of it, so what a model costs must be known, and what it leaves returned.

Linux alone; without glibc nothing is given back.
"""

from __future__ import annotations

import ctypes
import os


def resident_bytes() -> int:
    """What the process holds in memory now; 0 where it cannot be read: without file handles."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            pages = int(file.read().split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def trim() -> None:
    """Give freed memory back to the system; only glibc has the call."""
    call = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if call is not None:
        call(0)
