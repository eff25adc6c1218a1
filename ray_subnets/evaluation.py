"""Does the saved ensemble give the numbers that were printed?"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from rich.table import Table

from ray_subnets import driver, members, metrics
from ray_subnets.checkpoints import RunFolder

_COMPARED = ("accuracy", "nll", "brier", "ece")


@dataclass(frozen=True)
class Outcome:
    """Test metrics of the ensemble as recorded, and as predicted again from its files."""

    recorded: dict[str, float]
    again: dict[str, float]

    @property
    def difference(self) -> float:
        return max(abs(self.recorded[name] - self.again[name]) for name in _COMPARED)

    @property
    def agrees(self) -> bool:
        """Within what another device or processor changes."""
        return self.difference <= 1e-3

    def sentence(self) -> str:
        if self.difference <= 1e-6:
            return f"The saved ensemble gives the recorded numbers (to {self.difference:.1e})."
        return (
            f"The saved ensemble differs from the record by up to {self.difference:.1e}: another "
            "processor, device or version than environment.json says, or a changed recipe?"
        )


def evaluate(run: str | Path) -> Outcome:
    """Load the ensemble of a finished run and predict its test data.

    Raises:
        ValueError: not a finished run, damaged files, or its data is not here.
    """
    folder = RunFolder.open(run, needs="result.json")
    record = folder.read_json("result.json")
    config = driver.config_of(folder)
    ensemble = members.load(str(folder))
    data = driver.load_data(config)
    threads = torch.get_num_threads()
    torch.set_num_threads(config.resources.threads)
    try:
        with torch.no_grad():
            parts = [ensemble(images) for images in data.test.images.split(500)]
    finally:
        torch.set_num_threads(threads)
    again = metrics.summary(torch.cat(parts), data.test.labels)
    try:
        return Outcome(record["ensemble"]["test"], again)
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{folder}/result.json: incomplete or of another version ({error}); "
            f"'ray-subnets resume {folder}' writes it again"
        ) from None


def table(outcome: Outcome) -> Table:
    """Recorded and predicted again, side by side."""
    result = Table(title="Ensemble on test data", title_justify="left")
    for heading in ("", "recorded", "again"):
        result.add_column(heading, justify="left" if not heading else "right")
    for name in _COMPARED:
        result.add_row(name, f"{outcome.recorded[name]:.6f}", f"{outcome.again[name]:.6f}")
    return result
