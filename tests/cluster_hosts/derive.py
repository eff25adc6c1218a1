"""From `cluster/local.yaml` to a file for the hosts of the test: places change, commands do not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ruamel.yaml import YAML

VENV = "~/ray_subnets_venv"


def for_hosts(source: Path, target: Path, *, ips: Sequence[str], key: Path, venv: str) -> None:
    """Write `source` with the first of `ips` as head and the others as workers.

    Changed are the addresses, the login (root, with this key) and where the virtual environment is:
    hosts without a network cannot install one, so it is there already, under another path.
    """
    text = source.read_text()
    assert VENV in text
    yaml = YAML()
    config = yaml.load(text.replace(VENV, venv))
    config["provider"]["head_ip"], *config["provider"]["worker_ips"] = ips
    config["auth"] = {"ssh_user": "root", "ssh_private_key": str(key)}
    yaml.width = 10_000  # a folded command would still be one command, but is hard to read
    with target.open("w") as file:
        yaml.dump(config, file)
