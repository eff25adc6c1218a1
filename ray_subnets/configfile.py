"""From YAML text and overrides to a `Config`, with errors of one line; and to a larger one."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import fields
from math import isfinite
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from ray_subnets.config import (
    Config,
    DataSection,
    ParentTraining,
    ResourcesSection,
    SelectSection,
    SinglesSection,
)
from ray_subnets.groups import Noisy, Sparse, Stochastic, Tuning, vary

SHIPPED = [Path(__file__).parent / "configs", Path(__file__).parent.parent / "configs"]


def _yaml(text: str, source: str) -> Any:
    try:
        return YAML(typ="safe", pure=True).load(text)  # YAML 1.2: 5e-4 is a number
    except YAMLError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{source}: not valid YAML: {reason[:200]}") from None


def find(name: str) -> Path:
    """A config file by path, or a shipped one by name (`quickstart`).

    Raises:
        ValueError: neither; the message lists the shipped names.
    """
    path = Path(name)
    if path.is_file():
        return path
    stem = path.name.removesuffix(".yaml")
    for folder in SHIPPED:
        if (folder / f"{stem}.yaml").is_file() and path.parent in (Path(), Path("configs")):
            return folder / f"{stem}.yaml"
    shipped = sorted({file.stem for folder in SHIPPED for file in folder.glob("*.yaml")})
    close = difflib.get_close_matches(stem, shipped, 3)
    if close:
        raise ValueError(f"CONFIG: no file {name!r}; did you mean {' or '.join(close)}?")
    raise ValueError(f"CONFIG: no file {name!r}; shipped configs: {', '.join(shipped)}")


def _override(record: Any, assignment: str) -> None:
    """Apply one `key.path=value` in place; list items by number; `a,b` is a list."""
    key, equals, text = assignment.partition("=")
    if not equals or not key:
        raise ValueError(f"{assignment!r}: an override is written key.path=value")
    if "," in text and not text.startswith(("[", "{")):
        text = f"[{text}]"
    assign(record, key, _yaml(text, key))


def assign(record: Any, key: str, value: Any) -> None:
    """Set one `key.path` of settings as written in YAML, in place; list items by number.

    Raises:
        ValueError: there is no such place.
    """
    parts: list[Any] = key.split(".")
    node = record
    for depth, part in enumerate(parts):
        path = ".".join(parts[: depth + 1])
        last = depth == len(parts) - 1
        if isinstance(node, list):
            if not part.isdigit() or int(part) >= len(node):
                raise ValueError(f"{path}: no such entry; the list has 0 to {len(node) - 1}")
            part = int(part)
        elif isinstance(node, str) and depth == 1 and parts[0] in ("data", "model"):
            record[parts[0]] = node = {"name": node}
        elif not isinstance(node, dict):
            raise ValueError(f"{path}: {'.'.join(parts[:depth])} is a value, not a section")
        if last:
            node[part] = value
        else:
            if isinstance(node, dict) and node.get(part) is None:
                node[part] = {}
            node = node[part]


def _location(loc: Sequence[Any]) -> str:
    # pydantic names the branch of a union in the path (`children.0.sparse.count`); drop it.
    parts = list(loc)
    if len(parts) > 2 and parts[0] == "children":
        del parts[2]
    return ".".join(str(part) for part in parts)


def _known_keys(loc: Sequence[Any]) -> list[str]:
    """Names that would be valid where `loc` ends."""
    sections: dict[str, Any] = {
        "data": DataSection,
        "select": SelectSection,
        "resources": ResourcesSection,
        "singles": SinglesSection,
        "noisy": Noisy,
        "sparse": Sparse,
        "stochastic": Stochastic,
    }
    above = loc[-2] if len(loc) > 1 else None
    if above is None:
        return list(Config.model_fields)
    if above in ("parent", "tune"):
        return [field.name for field in fields(ParentTraining if above == "parent" else Tuning)]
    known = list(sections[above].model_fields) if above in sections else []
    return [*known, "vary"] if above in ("noisy", "sparse", "stochastic") else known


def one_line(
    error: ValidationError,
    source: str,
    known: Callable[[Sequence[Any]], list[str]] = _known_keys,
) -> str:
    """The first problem, and how many more there are.

    Args:
        known: from where a key stands to the names that would be valid there.
    """
    problems = error.errors()
    places = [problem["loc"] for problem in problems]

    def inside(loc: Sequence[Any]) -> bool:
        return any(len(at) > len(loc) and at[: len(loc)] == loc for at in places)

    # A list whose only entry is wrong is not also too short.
    problems = [p for p in problems if p["type"] != "too_short" or not inside(p["loc"])]
    first = problems[0]
    if first["type"] == "json_invalid":
        return f"{source}: not valid JSON ({first['msg'].removeprefix('Invalid JSON: ')})"
    where = _location(first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        key = str(first["loc"][-1])
        names = known(first["loc"])
        close = difflib.get_close_matches(key, names, 1)
        message = "unknown key" + (f"; did you mean {close[0]}?" if close else "")
        if not close and names:
            message += f"; known: {', '.join(names)}"
    elif first["type"] in ("missing", "missing_argument"):
        message = "required, but missing"
    elif first["type"] == "value_error":
        # Raised by a section's own check: the message starts with the key inside the section.
        where = f"{where}.{message}" if where else message
        message = ""
    elif first["type"].startswith("union_tag"):
        message = "method must be one of noisy, sparse, stochastic" + (
            f", not {first['input'].get('method')!r}"
            if isinstance(first["input"], dict) and "method" in first["input"]
            else ""
        )
    else:
        found = repr(first["input"])
        message += f", not {found if len(found) <= 60 else found[:57] + '...'}"
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return f"{source}: {where}{': ' + message if message else ''}{more}"


def parse(text: str, source: str, overrides: Sequence[str] = ()) -> Config:
    """A configuration from YAML text and `key.path=value` overrides.

    Raises:
        ValueError: one line naming the key, what is wrong, and what would be right.
    """
    record = record_of(text, source, overrides)
    if "sweep" in record:
        raise ValueError(
            f"{source}: sweep: this is a sweep; use 'ray-subnets sweep', or "
            "'ray-subnets run ... --from-sweep' for the run that it chose"
        )
    if "rows" in record:
        raise ValueError(f"{source}: rows: this is a benchmark; use 'ray-subnets benchmark'")
    return checked(record, source)


def record_of(text: str, source: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Settings as written, with overrides; not checked yet.

    Raises:
        ValueError: not a mapping, or an override has no place in it.
    """
    record = _yaml(text, source)
    if not isinstance(record, dict):
        raise ValueError(f"{source}: a config is a mapping of keys to values")
    override(record, overrides)
    return record


def override(record: dict[str, Any], assignments: Sequence[str]) -> None:
    """Apply `key.path=value` to settings as written, in place.

    Raises:
        ValueError: it is not of that form, or there is no such place.
    """
    for assignment in assignments:
        _override(record, assignment)


def checked(record: dict[str, Any], source: str) -> Config:
    """A configuration from settings as written.

    Raises:
        ValueError: one line naming the key, what is wrong, and what would be right.
    """
    try:
        return Config.model_validate_json(plain_json(record, source), strict=True)
    except ValidationError as error:
        raise ValueError(one_line(error, source)) from None


def plain_json(record: dict[str, Any], source: str) -> str:
    """Settings as written, `vary` expanded, as JSON: what a section is validated from.

    Raises:
        ValueError: a value that JSON has no type for, or a `vary` that is none.
    """
    for path, value in _leaves(record):
        if isinstance(value, float) and not isfinite(value):
            raise ValueError(f"{source}: {path}: must be a finite number, not {value}")
        if not isinstance(value, str | int | float | None):
            raise ValueError(
                f"{source}: {path}: {value} is read as a {type(value).__name__}; put it in quotes"
            )
    try:
        if "children" in record:
            record["children"] = vary(record["children"])
    except ValueError as error:
        raise ValueError(f"{source}: children.{error}") from None
    return json.dumps(record)


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every value that is not a mapping or a list, with its dotted path."""
    items: Iterable[tuple[Any, Any]]
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    else:
        yield path, value
        return
    for key, item in items:
        yield from _leaves(item, f"{path}.{key}" if path else str(key))


def load(name: str, overrides: Sequence[str] = ()) -> Config:
    """`parse` of a file found by `find`."""
    path = find(name)
    return parse(text_of(path), path.name, overrides)


def text_of(path: Path) -> str:
    """The text of a config file.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"CONFIG: cannot read {path}: {error}") from None


def grown(config: Config, to: int, label: str | None) -> Config:
    """The same run with `to` children in the group `label`; recipes that exist stay as they are.

    Raises:
        ValueError: no such group, it is not smaller, or `to` does not make whole partitions.
    """
    labels = [group.label for group in config.children]
    known = ", ".join(dict.fromkeys(labels))
    if label is None and len(labels) > 1:
        raise ValueError(f"--group: this run has several; name one of {known}")
    wanted = label or labels[0]
    if wanted not in labels:
        raise ValueError(f"--group: this run has no {wanted!r}; it has {known}")
    index = len(labels) - 1 - labels[::-1].index(wanted)  # ids go on after the last of that name
    others = sum(g.count for g, name in zip(config.children, labels, strict=True) if name == wanted)
    others -= config.children[index].count
    if to <= others + config.children[index].count:
        have = others + config.children[index].count
        raise ValueError(f"--to: {wanted} has {have} children already; name a larger number")
    record = config.model_dump(mode="json")
    record["children"][index]["count"] = to - others
    try:
        after = Config.model_validate_json(json.dumps(record), strict=True)
    except ValidationError as error:
        raise ValueError(one_line(error, "--to")) from None
    recipes = {spec.id: spec for spec in after.specs()}
    assert all(recipes[spec.id] == spec for spec in config.specs())
    return after
