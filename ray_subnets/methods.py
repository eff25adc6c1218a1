"""Methods and ways of tuning as a user writes them in Python: the settings of a group of children.

    Sparse(sparsity=0.5, partition=2)       OneCycle(epochs=2)

The settings are those of `groups.py` and of `recipes.Training`, with the same names, defaults and
checks as in a configuration file.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

from ray_subnets import groups
from ray_subnets.groups import Group, Tuning, plain
from ray_subnets.recipes import Schedule, Training


class Method:
    """One way to make children; `settings` as in a configuration file."""

    group: ClassVar[type[Group]]
    name: ClassVar[str]

    def __init__(self, **settings: Any) -> None:
        known = [key for key in self.group.model_fields if key not in ("method", "draws_of")]
        for key in settings:
            if key not in known:
                close = difflib.get_close_matches(key, known, 1)
                hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}"
                raise ValueError(f"{type(self).__name__}.{key}: unknown setting; {hint}")
        self.settings = settings

    def __repr__(self) -> str:
        written = ", ".join(f"{key}={value!r}" for key, value in self.settings.items())
        return f"{type(self).__name__}({written})"

    def __init_subclass__(cls) -> None:
        """Its help lists every setting."""
        lines = [f"{cls.__doc__}", "", "    Settings:"]
        parameters = []
        for key, info in cls.group.model_fields.items():
            if key in ("method", "draws_of"):
                continue
            text = " ".join((info.description or "").split())
            default = "" if info.is_required() else f" [{info.default!r}]"
            lines.append(f"        {key}{default}: {text}" if text else f"        {key}{default}")
            parameters.append(
                inspect.Parameter(
                    key,
                    inspect.Parameter.KEYWORD_ONLY,
                    default=inspect.Parameter.empty if info.is_required() else info.default,
                    annotation=info.annotation,
                )
            )
        cls.__doc__ = "\n".join(lines)
        cls.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]


class Noisy(Method):
    """Chapter 4: Gaussian noise on a subnetwork, no training."""

    group, name = groups.Noisy, "noisy"


class Sparse(Method):
    """Chapter 5: prune a subnetwork, tune what is left."""

    group, name = groups.Sparse, "sparse"


class Stochastic(Method):
    """Chapter 6: a fresh mask every forward pass, annealed to a fixed subnetwork."""

    group, name = groups.Stochastic, "stochastic"


@dataclass(frozen=True, kw_only=True)
class OneCycle(Tuning):
    """The rate rises to `lr` in the first tenth and falls to nearly nothing (section 5.2)."""

    schedule: Schedule = field(default="one_cycle", init=False)


def training(value: Any, argument: str) -> dict[str, Any]:
    """The settings of `tune` or `parent`.

    Raises:
        ValueError: it is something else.
    """
    if not isinstance(value, Training):
        raise ValueError(
            f"{argument}: must be OneCycle(epochs=...) or Training(epochs=...), not {value!r}"
        )
    return asdict(plain(value))


def groups_of(
    method: Method | Sequence[Method], children: int | None, tune: dict[str, Any] | None
) -> list[dict[str, Any]]:
    """The entries under `children:` of a configuration.

    Args:
        children: how many in all, divided evenly among methods that do not say `count` themselves.

    Raises:
        ValueError: not a method, or numbers that do not come out.
    """
    methods = [method] if isinstance(method, Method) else method
    if not isinstance(methods, list | tuple) or not methods:
        raise ValueError(
            f"method: must be Noisy(...), Sparse(...), Stochastic(...) or a list of them, not "
            f"{method!r}"
        )
    for one in methods:
        if not isinstance(one, Method):
            raise ValueError(f"method: must be made of Noisy, Sparse and Stochastic, not {one!r}")
    open_ = [one for one in methods if "count" not in one.settings]
    if children is None and open_:
        raise ValueError("children: say how many, or give each method its count")
    if children is not None:
        if isinstance(children, bool) or not isinstance(children, int) or children < 1:
            raise ValueError(f"children: must be a whole number from 1, not {children!r}")
        said = sum(one.settings["count"] for one in methods if "count" in one.settings)
        share, over = divmod(children - said, len(open_)) if open_ else (0, children - said)
        if over or (open_ and share < 1):
            raise ValueError(
                f"children: {children} do not divide among {len(methods)} methods; give each its "
                "count"
            )
    if tune is not None and all(one.name == "noisy" for one in methods):
        raise ValueError("tune: noisy children are not tuned; leave it out")
    entries = []
    for one in methods:
        entry: dict[str, Any] = {"method": one.name, **_plain(one.settings)}
        if "count" not in entry:
            entry["count"] = share
        if one.name != "noisy":
            own = entry.get("tune")
            if own is not None:
                entry["tune"] = training(own, "tune")
            elif tune is not None:
                entry["tune"] = tune
            else:
                raise ValueError(
                    f"tune: required, since {one.name} children are tuned: tune=OneCycle(epochs=2)"
                )
        entries.append(entry)
    return entries


def _plain(value: Any) -> Any:
    """Tuples as lists, as a file has them."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
