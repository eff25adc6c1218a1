"""Is a function that a folder names the user's own? A folder that came from elsewhere could name
any, `os:system` for one, and what is loaded calls it."""

from __future__ import annotations

import importlib.util
import inspect
import site
import sys
import sysconfig
from functools import cache
from pathlib import Path
from typing import Any

_HERE = Path(__file__).resolve().parent


def is_own(module: str) -> bool:
    """Is a module neither of Python's library nor of an installed package?

    Modules that do not exist, and those without a file, as a notebook, are.
    """
    if module.partition(".")[0] in sys.stdlib_module_names:
        return False
    if module == "__main__":
        return True
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return True  # the import says what is wrong
    if spec is None or not spec.origin:
        return True
    return is_own_file(spec.origin)


@cache
def _installed() -> tuple[Path, ...]:
    """Where Python's library and installed packages are."""
    paths = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    paths |= {*site.getsitepackages(), site.getusersitepackages()}
    return tuple(Path(path).resolve() for path in paths)


def is_own_file(name: str) -> bool:
    """Is a file of code the user's: not installed, and not of this package?"""
    path = Path(name).resolve()
    return not any(path.is_relative_to(place) for place in (*_installed(), _HERE))


def check_name(path: str) -> None:
    """May a folder name `package.module:function`? Nothing is imported but packages around it.

    Raises:
        ValueError: it is not the user's own; the message begins with the name.
    """
    if not is_own(path.partition(":")[0]):
        raise ValueError(_refused(path))


def check_target(path: str, target: Any) -> None:
    """Is what the name stands for of the user's own too, and not what their module imported?

    Raises:
        ValueError: see `check_name`.
    """
    named = inspect.isroutine(target) or inspect.isclass(target)
    if named and not is_own(getattr(target, "__module__", None) or "builtins"):
        raise ValueError(_refused(path))


def _refused(path: str) -> str:
    return (
        f"{path!r} is not code of yours but of an installed package, which a folder may not call; "
        "if you trust it, say how its network is made: load(..., model=...)"
    )
