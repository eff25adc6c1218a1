"""Sweeps without Ray: cells, trials, the trust region and the chosen cell."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Command
from test_errors import must_say, the_line
from tiny import run_serial

from ray_subnets import driver, metrics
from ray_subnets.checkpoints import RunFolder
from ray_subnets.sweeps import sweep, sweepfile, sweeptable, trials
from ray_subnets.sweeps.sweepfile import Sweep, cell_id, parent_job
from ray_subnets.sweeps.sweepmonitor import Monitor, run_here
from ray_subnets.sweeps.trials import Evaluator

TINY = """
name: tiny_sweep
data: digits
model: {name: mlp, hidden: [16]}
parent: {epochs: 2, batch_size: 64}
single: false
children:
  - {method: noisy, count: 4, sigma: 0.05}
  - {method: sparse, count: 2, partition: 2, tune: {epochs: 1, batch_size: 64}}
select: {count: 3, by: nll}
sweep:
  keys: {children.0.sigma: [0.02, 0.2], density: [0.3, 1.0]}
  seeds: [0, 1]
  kl_bound: 5.0
"""
NOISE = TINY.replace(
    "  - {method: sparse, count: 2, partition: 2, tune: {epochs: 1, batch_size: 64}}\n", ""
)

FAILING = "keys: {tune.lr: [0.05, 1.0e+30], tune.batch_size: [32, 64]}"


def parse(*overrides: str, text: str = TINY) -> Sweep:
    return sweepfile.parse(text, "tiny.yaml", overrides)


def swept(folder: Path, *overrides: str, text: str = NOISE) -> dict[str, Any]:
    settings = parse(*overrides, text=text)
    target = RunFolder.create(folder)
    target.write("config.yaml", settings.to_yaml().encode())
    return run_here(settings, target, Monitor(target, settings))


def numbers(record: dict[str, Any]) -> list[Any]:
    """What must be the same however a sweep was done."""
    clocks = {"seconds", "again"}
    return sorted(
        [
            t["id"],
            t["status"],
            [{k: v for k, v in s.items() if k not in clocks} for s in t["seeds"]],
        ]
        for t in record["trials"]
    )


# --- settings -----------------------------------------------------------------------------------


def test_keys_stand_for_settings_of_the_run_or_of_groups() -> None:
    settings = parse()
    assert settings.paths("density") == ["children.0.density"]  # only noise has one
    assert settings.paths("count") == ["children.0.count", "children.1.count"]
    assert settings.paths("tune.lr") == ["children.1.tune.lr"]
    assert settings.paths("parent.lr") == ["parent.lr"]
    cells = settings.cells()
    assert len(cells) == 4
    assert cells[1] == {"children.0.sigma": 0.02, "density": 1.0}
    config = settings.config(cells[1], 7)
    assert (config.seed, config.children[0].sigma) == (7, 0.02)  # type: ignore[union-attr]
    assert config.specs()[0].density == 1.0
    assert len({cell_id(cell) for cell in cells}) == 4
    assert cell_id({"a": 1, "b": 2}) == cell_id({"b": 2, "a": 1})


def test_settings_survive_the_folder() -> None:
    settings = parse("sweep.search=random", "sweep.samples=3")
    again = sweepfile.parse(settings.to_yaml(), "tiny.yaml")
    assert again.section == settings.section
    assert again.config(again.corners()[0], 0) == settings.config(settings.corners()[0], 0)


def test_parents_are_shared_where_nothing_touches_them() -> None:
    cells = parse().cells()
    assert len({parent_job(parse().config(cell, 0)).id for cell in cells}) == 1
    assert parent_job(parse().config(cells[0], 0)).id != parent_job(parse().config(cells[0], 1)).id
    for override in ("parent.lr=0.02", "model.hidden=[8]", "data.validation=100"):
        other = parse(override)
        assert (
            parent_job(other.config(cells[0], 0)).id != parent_job(parse().config(cells[0], 0)).id
        )


@pytest.mark.parametrize(
    ("override", "patterns"),
    [
        ("sweep.keys={}", [r"tiny\.yaml: sweep\.keys", "at least 1"]),
        ("sweep.keys={sigmaa: [1]}", [r"sweep\.keys\.sigmaa", "neither the run nor a group"]),
        ("sweep.keys={seed: [1]}", [r"sweep\.keys\.seed", r"sweep\.seeds"]),
        ("sweep.keys={density: []}", [r"keys\.density", "at least one value"]),
        ("sweep.keys={density: {low: 0.1, high: 0.5}}", [r"keys\.density", "grid needs a list"]),
        ("sweep.keys={density: [0.5, 1.5]}", ["density=1.5", r"children\.0\.density"]),
        ("sweep.seeds=[1, 1]", ["seeds", "once"]),
        ("sweep.samples=3", ["samples", "grid"]),
        ("sweep.search=optuna", ["samples", "how many trials optuna"]),
        ("sweep.kl_bound=0", [r"sweep\.kl_bound", "greater than 0"]),
        ("sweep.bound=1", [r"sweep\.bound", "unknown key"]),
        ("parent.workers=2", [r"parent\.workers", "one device"]),
    ],
)
def test_mistakes_are_one_line(override: str, patterns: list[str]) -> None:
    key, _, value = override.partition("=")
    with pytest.raises(ValueError, match="tiny") as caught:
        parse(f"{key}={value}")
    must_say(str(caught.value), patterns)


def test_ranges() -> None:
    text = NOISE.replace("[0.02, 0.2]", "{low: 0.5, high: 0.1}")
    with pytest.raises(
        ValueError, match=r"sweep\.keys\.children\.0\.sigma\.low: 0\.5 is not below"
    ):
        parse("sweep.search=random", "sweep.samples=2", text=text)
    text = NOISE.replace("[0.02, 0.2]", "{low: 1, high: 5, integer: true}")
    corners = parse("sweep.search=random", "sweep.samples=2", text=text).corners()
    assert [corner["children.0.sigma"] for corner in corners] == [1, 5]


def test_a_sweep_is_not_a_run_and_a_run_not_a_sweep(command: Command, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(NOISE)
    must_say(the_line(command("run", "a.yaml", cwd=tmp_path)), ["sweep", "ray-subnets sweep"])
    (tmp_path / "b.yaml").write_text(NOISE[: NOISE.index("sweep:")])
    must_say(the_line(command("sweep", "b.yaml", cwd=tmp_path)), ["sweep: required"])


# --- trials -------------------------------------------------------------------------------------


def test_a_trial_gives_the_numbers_of_a_run(tmp_path: Path) -> None:
    """The same parent, children, KL and ensemble as a run of these settings, on validation data."""
    settings = parse()
    values = settings.cells()[2]
    config = settings.config(values, 1)
    folder = RunFolder.create(tmp_path / "sweep")
    record = Evaluator(folder.root).trial(config, values)
    run = RunFolder.create(tmp_path / "run")
    result = run_serial(config, run)
    assert record["parent_nll"] == result["parent"]["validation"]["nll"]
    children = result["children"]
    assert record["accuracy"] == pytest.approx(
        sum(c["validation"]["accuracy"] for c in children) / len(children), rel=1e-12
    )
    ensemble = result["ensemble"]["validation"]["without_parent"]
    assert record["ensemble_nll"] == pytest.approx(ensemble["nll"], rel=1e-9)
    assert record["ensemble_accuracy"] == ensemble["accuracy"]
    logits = torch.stack(
        [
            torch.from_numpy(run.load_arrays(f"outputs/{id}.npz")["validation"])
            for id in ("parent", *(c["id"] for c in children))
        ]
    )
    kls = metrics.kl_divergence(logits)[0, 1:]
    assert record["kl"] == pytest.approx(float(kls.mean()), rel=1e-9)
    assert record["kl_std"] == pytest.approx(float(kls.std()), rel=1e-9)
    assert (record["children"], record["members"], record["failed"]) == (6, 3, 0)


def test_a_trial_never_reads_test_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other test data, the same record."""
    settings = parse(text=NOISE)
    config = settings.config(settings.cells()[0], 0)
    one = Evaluator(RunFolder.create(tmp_path / "one").root).evaluate(config)
    load = driver.load_data

    def spoiled(config: Any) -> Any:
        data = load(config)
        data.test.labels.fill_(0)
        data.test.images.zero_()
        return data

    monkeypatch.setattr(driver, "load_data", spoiled)
    two = Evaluator(RunFolder.create(tmp_path / "two").root).evaluate(config)
    assert {k: v for k, v in one.items() if k != "seconds"} == {
        k: v for k, v in two.items() if k != "seconds"
    }


def test_a_kl_target_can_be_swept(tmp_path: Path) -> None:
    text = NOISE.replace("sigma: 0.05", "kl_target: 0.01").replace(
        "children.0.sigma: [0.02, 0.2], density: [0.3, 1.0]", "kl_target: [0.01, 0.05]"
    )
    record = swept(tmp_path / "sweep", "sweep.seeds=[0]", "children.0.kl_draws=4", text=text)
    small, large = (trial["mean"] for trial in record["trials"])
    assert small["kl"] == pytest.approx(0.01, rel=0.02)
    assert large["kl"] == pytest.approx(0.05, rel=0.02)
    assert large["sigma_solved"] > small["sigma_solved"] > 0


# --- a whole sweep ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    path = tmp_path_factory.mktemp("sweeps") / "tiny"
    return path, swept(path)


def test_a_sweep_says_what_it_found(finished: tuple[Path, dict[str, Any]]) -> None:
    path, record = finished
    stored = json.loads((path / "sweep.json").read_text())
    assert stored["state"] == "finished"
    assert numbers(stored) == numbers(json.loads(json.dumps(record)))
    assert [len(trial["seeds"]) for trial in record["trials"]] == [2] * 4
    for trial in record["trials"]:
        kls = [seed["kl"] for seed in trial["seeds"]]
        assert trial["mean"]["kl"] == pytest.approx(sum(kls) / 2)
        assert trial["stderr"]["kl"] == pytest.approx(np.std(kls, ddof=1) / math.sqrt(2))
    assert len(list(path.glob("parent-*.safetensors"))) == 2  # one for each seed, not for each cell
    kl = {trial["id"]: trial["mean"]["kl"] for trial in record["trials"]}
    ids = np.array(record["maps"][0]["cells"])
    assert kl[ids[0, 0]] < kl[ids[0, 1]]
    assert kl[ids[0, 0]] < kl[ids[1, 0]]
    assert record["chosen_settings"].keys() == {"children.0.sigma", "children.0.density"}
    shown = "\n".join(sweeptable.lines(record))
    assert "Chosen: " in shown
    assert sweeptable.table(record).row_count == 4


def test_nothing_is_done_twice(
    finished: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after three of eight trials, it goes on with the other five, to the same numbers."""
    done: list[tuple[str, int]] = []
    evaluate = Evaluator.evaluate

    def counted(self: Evaluator, config: Any) -> Any:
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append((str(config.children[0].sigma), config.seed))
        return evaluate(self, config)

    settings = parse(text=NOISE)
    target = RunFolder.create(tmp_path / "sweep")
    monkeypatch.setattr(Evaluator, "evaluate", counted)
    with pytest.raises(KeyboardInterrupt):
        run_here(settings, target, Monitor(target, settings))
    assert json.loads(target.read("sweep.json"))["state"] == "stopped"
    first = list(done)
    done[:] = [("", -1)] * 100  # count on without the stop
    record = run_here(settings, target, Monitor(target, settings))
    assert len(done) - 100 == 8 - len(first) == 5
    assert numbers(record) == numbers(finished[1])


def test_a_cell_that_fails_is_reported_and_the_others_go_on(tmp_path: Path) -> None:
    text = TINY.replace("  - {method: noisy, count: 4, sigma: 0.05}\n", "")
    text = text.replace("keys: {children.0.sigma: [0.02, 0.2], density: [0.3, 1.0]}", FAILING)
    record = swept(tmp_path / "sweep", "sweep.seeds=[0]", "select.count=2", text=text)
    status = [trial["status"] for trial in record["trials"]]
    assert status == ["done", "done", "failed", "failed"]
    assert "every child failed" in record["trials"][2]["error"]
    assert record["chosen"] in {trial["id"] for trial in record["trials"][:2]}
    assert any(line.startswith("Failed: ") for line in sweeptable.lines(record))
    page = (tmp_path / "sweep/sweep.html").read_text()
    assert "NaN" not in page.split("application/json")[1].split("</script>")[0]


def test_from_sweep(
    finished: tuple[Path, dict[str, Any]], command: Command, tmp_path: Path
) -> None:
    """The run of the chosen settings, from the sweep's own file or another; overrides come last."""
    path, record = finished
    (tmp_path / "tiny.yaml").write_text(NOISE)
    answer = command(
        *("run", "tiny.yaml", "seed=1", "--from-sweep", str(path), "--serial", "-q"), cwd=tmp_path
    )
    assert answer.returncode == 0, answer.stderr
    run = RunFolder(tmp_path / "runs/tiny_sweep-chosen")
    result = run.read_json("result.json")
    chosen = next(trial for trial in record["trials"] if trial["id"] == record["chosen"])
    recipe = result["children"][0]["recipe"]
    assert recipe["sigma"] == chosen["values"]["children.0.sigma"]
    assert recipe["density"] == chosen["values"]["density"]
    validation = result["ensemble"]["validation"]["without_parent"]
    assert validation["nll"] == pytest.approx(chosen["seeds"][1]["ensemble_nll"], rel=1e-9)
    with pytest.raises(ValueError, match=r"no sweep\.json"):
        sweep.run_config(str(tmp_path / "tiny.yaml"), str(tmp_path))
    other = tmp_path / "other.yaml"
    other.write_text("name: x\nchildren: 3\n")
    with pytest.raises(ValueError, match=r"other\.yaml has no place for children\.0"):
        sweep.run_config(str(other), str(path))


def test_the_command_goes_on_with_a_folder(
    finished: tuple[Path, dict[str, Any]], command: Command
) -> None:
    path, record = finished
    answer = command("sweep", str(path), "--serial")
    assert answer.returncode == 0, answer.stderr
    assert "Chosen: " in answer.stdout
    assert numbers(json.loads((path / "sweep.json").read_text())) == numbers(
        json.loads(json.dumps(record))
    )
    must_say(the_line(command("sweep", str(path), "seed=1")), ["CONFIG", "as it was begun"])


# --- what follows from numbers ------------------------------------------------------------------


def trial(id: str, kl: float, accuracy: float, nll: float = 0.5, **more: Any) -> dict[str, Any]:
    mean = {"kl": kl, "accuracy": accuracy, "ensemble_accuracy": accuracy, "ensemble_nll": nll}
    mean["parent_accuracy"] = more.pop("parent", 0.9)
    return {
        "id": id,
        "status": "done",
        "inside": kl <= 0.05,
        "seeds": [{"failed": 0}],
        "mean": mean,
    } | more


def test_the_best_cell_inside_the_bound_is_chosen() -> None:
    cells = [
        trial("far", 0.2, 0.99),
        trial("near", 0.01, 0.90),
        trial("best", 0.04, 0.95, 0.4),
        trial("tie", 0.03, 0.95, 0.5),
        trial("half", 0.02, 0.97, status="stopped"),
        trial("lame", 0.02, 0.97, seeds=[{"failed": 1}]),
    ]
    assert sweep.choose(cells, "ensemble_accuracy") == "best"
    assert sweep.choose(cells[:2], "ensemble_nll") == "near"
    assert sweep.choose(cells[:1], "ensemble_accuracy") is None


def test_a_search_is_led_back_inside_the_bound() -> None:
    inside = [{"kl": 0.04, "ensemble_accuracy": 0.9, "ensemble_nll": 0.3}]
    outside = [{"kl": 0.10, "ensemble_accuracy": 0.95, "ensemble_nll": 0.2}]
    assert sweep.objective(inside, "ensemble_accuracy", 0.05) == 0.9
    assert sweep.objective(outside, "ensemble_accuracy", 0.05) == pytest.approx(-0.05)
    assert sweep.objective(outside, "ensemble_nll", None) == -0.2


def test_the_contour_is_where_kl_meets_the_bound() -> None:
    """KL = sigma^2 on a logarithmic grid: a straight line at the column of sqrt(bound)."""
    sigmas = np.array([0.01, 0.1, 1.0])
    kl = np.stack([sigmas**2, sigmas**2])
    (line,) = sweep.contour(kl, 0.1)
    np.testing.assert_allclose(sorted(line), [[1.5, 0.0], [1.5, 1.0]], atol=1e-3)
    kl[0, 0] = np.nan
    assert sweep.contour(kl, 100.0) == []
    assert sweep.contour(kl[:1], 0.1) == []


def test_the_line_is_fitted_within_a_nat() -> None:
    cells = [  # of two parents, whose children lose as much
        trial(str(kl), kl, parent - 0.2 * kl, parent=parent)
        for kl, parent in ((0.1, 0.9), (0.2, 0.7), (0.5, 0.9), (0.9, 0.7))
    ]
    fit = sweep.line_of_fit([*cells, trial("far", 7.0, 0.1)])
    assert fit is not None
    assert fit["slope"] == pytest.approx(-0.2)
    assert fit["intercept"] == pytest.approx(0.0)
    assert (fit["correlation"], fit["n"]) == (pytest.approx(-1), 4)
    assert sweep.line_of_fit(cells[:2]) is None


def test_more_than_two_keys_are_slices() -> None:
    settings = parse(
        "sweep.keys={density: [0.5, 1.0], sigma: [0.1, 0.2, 0.3], mirrored: [false, true]}",
        text=NOISE,
    )
    cells = {cell_id(v): {"values": v, "seeds": [], "status": "waiting"} for v in settings.cells()}
    record = sweep.summarise(settings, cells, state="running")
    assert [(m["x"], m["y"], m["fixed"]) for m in record["maps"]] == [
        ("sigma", "density", {"mirrored": False}),
        ("sigma", "density", {"mirrored": True}),
    ]
    assert sorted(id for m in record["maps"] for row in m["cells"] for id in row) == sorted(cells)


def test_a_damaged_record_costs_nothing(tmp_path: Path) -> None:
    """`sweep.json` is made again from the trials' own files; of a search, cells stay listed."""
    settings = parse("sweep.seeds=[0]", text=NOISE)
    target = RunFolder.create(tmp_path / "sweep")
    before = run_here(settings, target, Monitor(target, settings))
    target.write("sweep.json", b"{")
    monitor = Monitor(target, settings)
    assert monitor.complete
    assert numbers(monitor.write()) == numbers(before)
    search = parse("sweep.search=random", "sweep.samples=2", "sweep.seeds=[0]", text=NOISE)
    first = Monitor(target, search)
    assert [cell["status"] for cell in first.cells.values()] == ["done"] * 4
    first.started({"children.0.sigma": 0.7, "density": 0.5})
    first.write()
    assert [c["status"] for c in Monitor(target, search).cells.values()].count("stopped") == 1


def test_a_damaged_trial_is_done_again(finished: tuple[Path, dict[str, Any]]) -> None:
    path, _ = finished
    values = parse(text=NOISE).cells()[0]
    name = path / trials.record_name(values, 0)
    before = json.loads(name.read_text())
    name.write_text("{")
    again = Evaluator(path).trial(parse(text=NOISE).config(values, 0), values)
    assert {k: v for k, v in again.items() if k != "seconds"} == {
        k: v for k, v in before.items() if k != "seconds"
    }
