"""Pages from templates: HTML that needs nothing beside it."""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, PackageLoader


def render(template: str, **content: Any) -> str:
    """A page of `templates/`; what is put into it is escaped."""
    environment = Environment(
        loader=PackageLoader("ray_subnets"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False}  # keys in their own order
    return environment.get_template(template).render(**content)
