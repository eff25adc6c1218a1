"""What a user's own code does wrong, in a line."""

from __future__ import annotations

import traceback

from ray_subnets.own_code import is_own_file


def raised(error: BaseException) -> str:
    """What a user's code raised and where, in a line."""
    frames = traceback.extract_tb(error.__traceback__)
    last = frames[-1] if frames else None
    last = next((frame for frame in reversed(frames) if _is_own(frame)), last)
    place = f" ({last.filename}, line {last.lineno})" if last else ""
    text = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}{': ' + text if text else ''}{place}"


def is_theirs(error: BaseException) -> bool:
    """Did a user's code raise it, and not the machine under it?"""
    machine = isinstance(error, OSError | MemoryError) or "CUDA" in str(error)
    frames = traceback.extract_tb(error.__traceback__)
    return not machine and any(map(_is_own, frames))


def _is_own(frame: traceback.FrameSummary) -> bool:
    return not frame.filename.startswith("<") and is_own_file(frame.filename)
