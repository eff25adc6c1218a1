"""Objects of a user's own classes on their way to other processes."""

from __future__ import annotations

import sys
from typing import Any

from ray import cloudpickle


def _received(paths: list[str], content: bytes) -> Any:
    """The object, with the sender's modules at hand (where this machine has them)."""
    sys.path += [path for path in paths if path not in sys.path]
    return cloudpickle.loads(content)


class Sent:
    """Arrives in another process as the object that it was made of.

    Ray lets a worker import what lies in the driver's folder; a user's module may lie elsewhere on
    the driver's path.

    Raises:
        ValueError: the object cannot be sent.
    """

    def __init__(self, value: Any, what: str) -> None:
        try:
            self._content = cloudpickle.dumps(value)
        except Exception as error:  # whatever a stranger's object raises
            reason = " ".join(str(error).split())[:200]
            raise ValueError(
                f"ray: {what} cannot be sent to other processes ({reason}); use ray=False"
            ) from None

    def __reduce__(self) -> tuple[Any, tuple[list[str], bytes]]:
        return _received, ([path for path in sys.path if path], self._content)
