"""The tables and figures of the studies, from small records written by hand."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from analysis import groups, where_it_pays

REPOSITORY = Path(__file__).parent.parent
NAMES = ("accuracy", "brier", "nll_scaled", "ece", "ece_floor", "ece_floor_std")


def scores(nll: float) -> dict[str, float]:
    return {"nll": nll} | dict.fromkeys(NAMES, 0.5)


def child(id: str, group: str, epochs: int) -> dict[str, Any]:
    return {"id": id, "group": group, "epochs": epochs, "kept": 0.5, "kl_from_parent": 0.1}


def study(seed: int, *values: float) -> dict[str, Any]:
    """A run with parent NLL 0.9 and a group for each value."""
    return {
        "name": "study",
        "seed": seed,
        "parent": {"epochs": 4, "test": scores(0.9), "validation": {"nll": 0.9}},
        "single": None,
        "children": [child(f"g{i}-{k}", f"g{i}", 2) for i in range(len(values)) for k in (0, 1)],
        "ensemble": {
            "groups": {
                f"g{i}": {
                    "members": [f"g{i}-0", f"g{i}-1"],
                    "test": scores(nll),
                    "validation": {"nll": nll},
                    "mean_member": scores(nll + 1),
                    "diversity": {"disagreement": 0.1},
                }
                for i, nll in enumerate(values)
            }
        },
    }


def test_groups_over_seeds_and_paired() -> None:
    """By hand: g0 0.1, 0.2, 0.6 has mean 0.3 and error 0.1528; g1 is 0.05 higher in each run."""
    table = groups.frame([study(i, nll, nll + 0.05) for i, nll in enumerate((0.1, 0.2, 0.6))])
    lines = groups.markdown(table, against="g0").splitlines()
    assert lines[2].startswith("| parent | 1 | 4 | 50.00 ± 0.00 | 0.9000 ± 0.0000 |")
    assert lines[3].startswith("| g0 | 2 | 8 | 50.00 ± 0.00 | 0.3000 ± 0.1528 |")
    assert lines[4].endswith("| +0.0500 ± 0.0000 | 3 |")


def row(
    kind: str, run: str, group: str, epochs: int, validation: float, nll: float
) -> dict[str, Any]:
    return {
        "kind": kind,
        "run": run,
        "group": group,
        "seed": 0,
        "nets": 1,
        "epochs": epochs,
        "validation_nll": validation,
        "validation_nll_scaled": validation,
        "validation_accuracy": 1 - validation,
        **scores(nll),
    }


def test_the_opponent_is_the_best_on_validation_data_within_the_budget() -> None:
    table = pd.DataFrame(
        [
            row("single", "map-w8-singles", "single-10", 10, 0.50, 0.60),
            row("single", "map-w8-singles", "single-20", 20, 0.40, 0.55),  # best on validation
            row("single", "map-w8-singles", "single-30", 30, 0.45, 0.30),  # best on test: no matter
            row("single", "map-w8-singles", "single-60", 60, 0.10, 0.10),  # beyond the budget
            row("single", "map-w9-singles", "single-10", 10, 0.01, 0.01),  # another network
            row("group", "map-w8-p20", "sparse-4x5", 40, 0.35, 0.50),
            row("group", "map-w8-p5", "sparse-1x1", 6, 0.35, 0.50),  # no single is so short
        ]
    )
    found = where_it_pays.opponents(table)
    assert len(found) == 1
    for measure in ("nll", "nll_scaled", "accuracy"):
        assert found.iloc[0][f"epochs_{measure}"] == 20
    assert found.iloc[0]["d_nll"] == pytest.approx(0.50 - 0.55)
    assert "| w8 | 20 | sparse-4x5 | 40 |" in where_it_pays.markdown(found)


def test_the_figure_is_drawn(tmp_path: Path) -> None:
    rows = []
    for seed in (0, 1, 2):
        for epochs in (10, 20):
            single = row("single", "map-w8-singles", f"single-{epochs}", epochs, 0.5, 0.6)
            rows.append(single | {"seed": seed})
        rows.append(row("group", "map-w8-p10", "sparse-2x5", 20, 0.4, 0.5) | {"seed": seed})
    table = pd.DataFrame(rows)
    path = tmp_path / "map.png"
    where_it_pays.draw(table, where_it_pays.opponents(table), path)
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        ("analysis.groups", ["none"], "no such folder"),
        ("analysis.where_it_pays", ["none"], "no such folder"),
        ("analysis.studies", ["none", "--figure", "x.png"], "make study NAME="),
    ],
)
def test_mistakes_are_one_line(module: str, arguments: list[str], message: str) -> None:
    answer = subprocess.run(
        [sys.executable, "-m", module, *arguments], capture_output=True, text=True, cwd=REPOSITORY
    )
    assert answer.returncode == 2
    assert answer.stderr.count("\n") == 1
    assert message in answer.stderr


def test_of_each_budget_the_best_on_validation_data() -> None:
    keys = ("network", "budget", "parent", "group", "validation", "nll")
    rows = [
        ("w8", 40, 20, "a", 0.30, 0.9),
        ("w8", 40, 20, "a", 0.40, 0.9),
        ("w8", 40, 10, "b", 0.36, 0.1),  # better on test data: no matter
        ("w8", 60, 20, "a", 0.90, 0.9),
    ]
    found = pd.DataFrame([dict(zip(keys, one, strict=True)) for one in rows])
    chosen = where_it_pays.best_of_each_budget(found)
    assert list(zip(chosen["budget"], chosen["group"], strict=True)) == [
        (40, "a"),
        (40, "a"),
        (60, "a"),
    ]


def test_figure_4_3_from_a_sweep(tmp_path: Path) -> None:
    """A sweep whose KL is (sigma * density)^2: the window is bound^0.5 / density."""
    from analysis import trust_region

    trials = []
    for density in (0.1, 1.0):
        for sigma in (0.01, 0.1, 1.0, 10.0):
            kl = (sigma * density) ** 2
            value = 0.9 - 0.2 * min(kl, 2)
            keys = ("accuracy", "vote_accuracy", "mean_accuracy", "parent_accuracy")
            mean = {"kl": kl} | dict.fromkeys(keys, value)
            trials.append(
                {
                    "values": {"sigma": sigma, "density": density},
                    "status": "done",
                    "mean": mean,
                    "stderr": dict.fromkeys(mean, 0.01),
                }
            )
    record = {
        "keys": {"sigma": {}, "density": {}},
        "kl_bound": 0.04,
        "seeds": [0],
        "trials": trials,
        "fit": {"slope": -0.2, "intercept": 0.9, "correlation": -1.0, "n": 6},
    }
    (tmp_path / "sweep.json").write_text(json.dumps(record))
    found = trust_region.load(tmp_path)
    assert trust_region.by_density(found).keys() == {0.1, 1.0}
    for density, cells in trust_region.by_density(found).items():
        assert trust_region.window(cells, 0.04) == pytest.approx(0.2 / density)
    assert trust_region.window(trust_region.by_density(found)[0.1], 1e9) is None
    text = trust_region.table(found)
    assert "20.0 points per nat" in text
    assert "| 1 | 0.2000 |" in text
    trust_region.draw(found, str(tmp_path / "figure.png"))
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    record["keys"] = {"sigma": {}}
    (tmp_path / "sweep.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="over sigma and density"):
        trust_region.load(tmp_path)


def test_the_map_of_figures_names_what_is_there() -> None:
    """Links, commands and configs of analysis/README.md; every module of analysis/ is in it."""
    text = (REPOSITORY / "analysis/README.md").read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert (REPOSITORY / "analysis" / target).exists(), target
    modules = {path.stem for path in (REPOSITORY / "analysis").glob("*.py")} - {"__init__"}
    for name in re.findall(r"analysis\.([a-z_]+)", text):
        assert name in modules | {"benchmarks"}, name
    for name in modules:
        assert f"`{name}`" in text or f"analysis.{name}" in text, name
    for name in re.findall(r"NAME=(study_[a-z_]+)|ray-subnets (?:run|benchmark) ([a-z]\w+)", text):
        assert (REPOSITORY / f"configs/{''.join(name)}.yaml").exists(), name
