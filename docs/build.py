"""The API reference, from the docstrings, by pdoc: `make docs` writes build/docs/."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import pdoc

import ray_subnets

MODULES = (
    "ray_subnets",
    *(f"ray_subnets.{name}" for name in ("config", "groups", "recipes", "answers", "cascade")),
    *(f"ray_subnets.{name}" for name in ("regression", "regressor")),
    *(f"ray_subnets.{name}" for name in ("metrics", "masks", "schedules", "serving.requested")),
)


def build(target: Path) -> None:
    """Write HTML; a name that cannot be documented is an error."""
    for name in ray_subnets.__all__:  # they are imported on first use, and pdoc does not use them
        setattr(ray_subnets, name, getattr(ray_subnets, name))
    pdoc.render.configure(docformat="google", search=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # Annotated[...] in a signature that pydantic made: shown as text.
        warnings.filterwarnings("ignore", "Error parsing type annotation")
        pdoc.pdoc(*MODULES, output_directory=target)


if __name__ == "__main__":
    build(Path(sys.argv[1] if len(sys.argv) > 1 else "build/docs"))
