"""Does the saved ensemble give the numbers that were printed?"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from rich.table import Table

from ray_subnets import datasets, driver, members, metrics
from ray_subnets.checkpoints import CELL, RunFolder

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
    of_benchmark = RunFolder(run).exists(CELL)
    file = CELL if of_benchmark else "result.json"
    folder = RunFolder.open(run, needs=file)
    record = folder.read_json(file)
    ensemble = members.load(str(folder))
    if of_benchmark:
        options = dict(record["cell"]["data"])
        data, wanted = datasets.load(options.pop("name"), **options), int(record["threads"])
        record = {"ensemble": record}
    else:
        config = driver.config_of(folder)
        data, wanted = driver.load_data(config), config.resources.threads
    threads = torch.get_num_threads()
    torch.set_num_threads(wanted)
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
            f"{folder}/{file}: incomplete or of another version ({error}); "
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
