"""How a process that trains keeps its memory."""

from __future__ import annotations

import ctypes
from contextlib import suppress

_TRIM, _MMAP_MAX = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of <malloc.h>


def keep_freed() -> None:
    """Tell glibc to keep up to 1 GB that torch has freed, for torch's next step.

    By default it hands an activation's memory back to the system and faults it in again a page at
    a time, zeroed: always where a tensor has over 32 MB, whatever its threshold is set to, so it
    may not map such a tensor by itself at all. `analysis.benchmarks.kept_memory` has what it gains
    and what it keeps. For processes of our own, actors and commands: a caller's allocator is not
    ours to change. Changes no number; does nothing where there is no glibc.
    """
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_TRIM, 1 << 30)
        libc.mallopt(_MMAP_MAX, 0)
