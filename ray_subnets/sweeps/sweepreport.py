"""`sweep.html`: one page, no network. It draws itself from `sweep.json`, which it carries.

While the sweep runs it fetches newer ones, if it came from a server, or loads itself again.
"""

from __future__ import annotations

from pathlib import Path

from ray_subnets import pages
from ray_subnets.checkpoints import RunFolder
from ray_subnets.sweeps.sweep import RECORD

PAGE = "sweep.html"


def write(folder: RunFolder) -> Path:
    """Write `sweep.html` from the folder's `sweep.json`.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    record = folder.read_json(RECORD)
    page = pages.render(PAGE, record=record, name=record["name"])
    folder.write(PAGE, page.encode())
    return folder.root / PAGE
