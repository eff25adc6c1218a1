"""What a user's own code does wrong, in a line."""

from __future__ import annotations

import traceback


def raised(error: BaseException) -> str:
    """What a user's code raised and where, in a line."""
    frames = traceback.extract_tb(error.__traceback__)
    last = frames[-1] if frames else None
    place = f" ({last.filename}, line {last.lineno})" if last else ""
    text = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}{': ' + text if text else ''}{place}"
