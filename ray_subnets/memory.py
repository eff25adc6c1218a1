"""How a process that trains keeps its memory."""

from __future__ import annotations

import ctypes
from contextlib import suppress

_TRIM, _MMAP = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of <malloc.h>


def keep_freed() -> None:
    """Tell glibc to keep up to 512 MB that torch has freed, for torch's next step.

    By default it hands an activation's memory back to the system and faults it in again a page at
    a time: in an actor, where no earlier work has taught it otherwise, that made evaluation 1.8
    times as long. For processes of our own, actors and commands: a caller's allocator is not ours
    to change. Changes no number; does nothing where there is no glibc.
    """
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_TRIM, 512 << 20)
        libc.mallopt(_MMAP, 32 << 20)  # the most that glibc takes
