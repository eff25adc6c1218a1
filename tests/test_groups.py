"""Groups of children: names, grids, shared draws, and what cannot be asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_errors import must_say
from tiny import run_serial, tiny

from ray_subnets import configfile, table
from ray_subnets.checkpoints import RunFolder
from ray_subnets.config import Config
from ray_subnets.recipes import ChildSpec

HEAD = """
name: tiny
data: digits
model: {name: mlp, hidden: [16]}
parent: {epochs: 1, batch_size: 64}
single: false
children:
"""
GRID = """
  - {method: noisy, count: 2, sigma: 0.05}
  - method: sparse
    count: 2
    partition: 2
    tune: {epochs: 1, batch_size: 64}
    vary: {draw: [exact, bernoulli], tune.lr: [0.1, 0.001], mask_classifier: [false, true]}
  - {method: noisy, count: 1, sigma: 0.1}
"""


def parse(children: str) -> Config:
    return configfile.parse(HEAD + children, "tiny.yaml")


def by_group(config: Config) -> dict[str, list[ChildSpec]]:
    groups: dict[str, list[ChildSpec]] = {}
    for spec in config.specs():
        groups.setdefault(spec.label, []).append(spec)
    return groups


# --- vary ---------------------------------------------------------------------------------------


def test_vary_makes_a_group_of_every_combination() -> None:
    """In the order written, the last setting fastest; the others are as without `vary`."""
    config = parse(GRID)
    found = [
        (group.name, group.draw, group.tune.lr, group.mask_classifier)
        for group in config.children
        if group.method == "sparse"
    ]
    assert found == [
        (f"sparse-draw={draw}-lr={lr:g}-mask_classifier={last}", draw, lr, last)
        for draw in ("exact", "bernoulli")
        for lr in (0.1, 0.001)
        for last in (False, True)
    ]
    methods = [group.method for group in config.children]
    assert methods == ["noisy", *["sparse"] * 8, "noisy"]
    for group in config.children:
        assert group.method == "noisy" or (group.count, group.tune.batch_size) == (2, 64)


def test_variants_share_their_seeds_and_nobody_elses() -> None:
    groups = by_group(parse(GRID))
    variants = [specs for label, specs in groups.items() if label != "noisy"]
    seeds = {tuple((spec.seed, spec.training_seed) for spec in specs) for specs in variants}
    assert len(variants) == 8
    assert len(seeds) == 1
    mine = {spec.seed for spec in variants[0]}
    assert mine.isdisjoint(spec.seed for spec in groups["noisy"])
    assert len({spec.seed for spec in groups["noisy"]}) == 3  # two groups of one label


def test_vary_keeps_a_name_and_reaches_new_sections() -> None:
    config = parse("""
  - {method: sparse, name: mine, count: 1, tune: {epochs: 1}, vary: {sparsity: [0.5, 0.25]}}
  - {method: sparse, count: 1, sparsity: 0.5, vary: {tune.epochs: [2, 3]}}
""")
    labels = ["mine-sparsity=0.5", "mine-sparsity=0.25", "sparse-epochs=2", "sparse-epochs=3"]
    assert [group.label for group in config.children] == labels
    assert [spec.epochs for spec in config.specs()] == [1, 1, 2, 3]
    assert [spec.density for spec in config.specs()] == [0.5, 0.75, 0.5, 0.5]


def test_a_written_config_is_the_same_config() -> None:
    """The run folder holds the expanded groups; reading them again changes no recipe."""
    config = parse(GRID)
    again = configfile.parse(config.to_yaml(), "config.yaml")
    assert again == config
    assert again.specs() == config.specs()


# --- names and seeds ----------------------------------------------------------------------------


def test_ids_are_unique_and_named_after_their_group() -> None:
    ids = [spec.id for spec in parse(GRID).specs()]
    assert len(set(ids)) == len(ids) == 19
    assert [id for id in ids if id.startswith("noisy")] == ["noisy-000", "noisy-001", "noisy-002"]
    assert "sparse-draw=exact-lr=0.1-mask_classifier=True-001" in ids


def test_draws_of_shares_the_draws_of_another_group() -> None:
    """The same masks in both; without it they differ."""
    text = """
  - {method: noisy, count: 1, sigma: 0.05}
  - {method: sparse, count: 2, partition: 2, tune: {epochs: 1}}
  - {method: stochastic, name: soft, count: 2, partition: 2, anneal_epochs: 1, tune: {epochs: 1}%s}
"""
    shared, apart = by_group(parse(text % ", draws_of: 1")), by_group(parse(text % ""))
    assert [s.seed for s in shared["soft"]] == [s.seed for s in shared["sparse"]]
    assert [s.training_seed for s in shared["soft"]] == [s.training_seed for s in shared["sparse"]]
    assert not {s.seed for s in apart["soft"]} & {s.seed for s in apart["sparse"]}
    assert apart["sparse"] == shared["sparse"]


def test_draws_of_counts_groups_as_they_are_written() -> None:
    """A group with `vary` is one, and may itself share the draws of one."""
    groups = by_group(
        parse("""
  - {method: sparse, count: 1, tune: {epochs: 1}, vary: {sparsity: [0.5, 0.7, 0.9]}}
  - {method: sparse, name: second, count: 1, sparsity: 0.5, tune: {epochs: 1}}
  - {method: noisy, count: 1, sigma: 0.1, draws_of: 1}
  - {method: noisy, count: 1, draws_of: 0, vary: {sigma: [0.1, 0.2]}}
""")
    )
    seeds = {label: {spec.seed for spec in specs} for label, specs in groups.items()}
    assert seeds["noisy"] == seeds["second"] != seeds["sparse-sparsity=0.5"]
    assert seeds["noisy-sigma=0.1"] == seeds["noisy-sigma=0.2"] == seeds["sparse-sparsity=0.9"]
    assert seeds["sparse-sparsity=0.9"] == seeds["sparse-sparsity=0.5"]


def test_names_reach_the_result_and_the_table(tmp_path: Path) -> None:
    config = tiny(
        "children.0.name=loud", "children.1.name=a.b+c=1", "single=false", "parent.epochs=1"
    )
    record = run_serial(config, RunFolder.create(tmp_path / "run"))
    labels = ["loud", "a.b+c=1", "stochastic"]
    assert list(record["ensemble"]["groups"]) == labels
    assert [child["group"] for child in record["children"]] == [
        *["loud"] * 4,
        *["a.b+c=1"] * 2,
        *["stochastic"] * 2,
    ]
    for label, group in record["ensemble"]["groups"].items():
        assert all(id.startswith(label) for id in group["members"])
        assert len(group["by_size"]) == len(group["members"])
        last = group["by_size"][-1]
        assert last["nll"] == pytest.approx(group["test"]["nll"], abs=1e-9)
    names = [row.name for row in table.rows(record)]
    assert [name for name in names if name.endswith(" ensemble")] == [
        *[f"{label} ensemble" for label in labels],
        "selected ensemble",
    ]


# --- mistakes -----------------------------------------------------------------------------------

SPARSE = "method: sparse, count: 2, partition: 2, tune: {epochs: 2}"
STOCHASTIC = "method: stochastic, count: 2, partition: 2, anneal_epochs: 1, tune: {epochs: 2}"
MISTAKES: list[tuple[str, list[str]]] = [
    # vary
    (f"{{{SPARSE}, vary: 3}}", [r"children\.vary", "map settings to lists", r"\[0\.5, 0\.9\]"]),
    (f"{{{SPARSE}, vary: {{draw: exact}}}}", [r"children\.vary", "map settings to lists"]),
    (f"{{{SPARSE}, vary: {{draw: []}}}}", [r"children\.vary", "map settings to lists"]),
    (f"{{{SPARSE}, vary: {{count.x: [1]}}}}", [r"children\.vary", "'count.x' is not a setting"]),
    (f"{{{SPARSE}, vary: {{drw: [exact]}}}}", [r"children\.0\.drw", "did you mean draw"]),
    (f"{{{SPARSE}, vary: {{tune.lr: [0.1, 0]}}}}", [r"children\.1\.tune\.lr", "greater than 0"]),
    # names
    (f"{{{SPARSE}, name: parent}}", [r"children\.name", "'parent' is taken", "another name"]),
    (f"{{{SPARSE}, name: a/b}}", [r"children\.0\.name", "'a/b'"]),
    (f"{{{SPARSE}, name: x}}\n  - {{{SPARSE}, name: x}}", [r"children\.name", "'x' is taken"]),
    # what does not fit together
    (
        "{method: sparse, count: 1, tune: {epochs: 1}}",
        [r"children\.0\.sparsity", "required where partition is 1"],
    ),
    (
        "{method: sparse, count: 3, partition: 3, sparsity: 0.5, tune: {epochs: 1}}",
        [r"children\.0\.sparsity", r"0\.667", "leave it out"],
    ),
    (
        "{method: noisy, count: 3, partition: 3, density: 0.5, sigma: 0.1}",
        [r"children\.0\.density", "leave it out"],
    ),
    (
        f"{{{SPARSE}, criterion: magnitude, draw: bernoulli}}",
        [r"children\.0\.draw", "use draw: exact"],
    ),
    (
        "{method: sparse, count: 3, partition: 3, criterion: magnitude, tune: {epochs: 1}}",
        [r"children\.0\.criterion", "partition of 1 or 2, or criterion: random"],
    ),
    (f"{{{SPARSE}, prune_epochs: 3}}", [r"children\.0\.prune_epochs", r"more than tune\.epochs"]),
    (
        f"{{{SPARSE}, prune_epochs: 1, structure: unit}}",
        [r"children\.0\.prune_epochs", "use structure: weight"],
    ),
    (
        f"{{{SPARSE}, prune_epochs: 1, criterion: magnitude}}",
        [r"children\.0\.prune_epochs", "use partition: 1 and scope: local, or criterion: random"],
    ),
    (f"{{{SPARSE}, bag: 0}}", [r"children\.0\.bag", "greater than 0"]),
    (f"{{{SPARSE}, structure: row}}", [r"children\.0\.structure", "'weight'", "'row'"]),
    (
        f"{{{STOCHASTIC}, probabilities: mixture, mixture: [0.2, -0.1, 0.8, 0.1]}}",
        [r"children\.0\.mixture", "must not be negative"],
    ),
    (
        f"{{{STOCHASTIC}, probabilities: mixture, mixture: [0.2, 0.1]}}",
        [r"children\.0\.mixture"],
    ),
    (
        "{method: stochastic, count: 3, partition: 3, probabilities: mixture, anneal_epochs: 1, "
        "tune: {epochs: 1}}",
        [r"children\.0\.probabilities", "use uniform"],
    ),
    (f"{{{SPARSE}, draws_of: -1}}", [r"children\.0\.draws_of", "greater than or equal to 0"]),
    (f"{{{SPARSE}, draws_of: 7}}", [r"children\.0\.draws_of", "no such group", "from 0"]),
    (
        f"{{{SPARSE}, draws_of: 1}}\n  - {{{SPARSE}, draws_of: 2}}\n  - {{{SPARSE}}}",
        [r"children\.0\.draws_of", "another one itself", "name that one"],
    ),
    (f"{{{SPARSE}, vry: {{draw: [exact]}}}}", [r"children\.0\.vry", "did you mean vary"]),
]


@pytest.mark.parametrize(("children", "patterns"), MISTAKES)
def test_a_mistake_is_one_line(children: str, patterns: list[str]) -> None:
    """It names the key and what would be right."""
    with pytest.raises(ValueError, match=r".") as caught:
        parse(f"  - {children}\n")
    must_say(str(caught.value), ["tiny.yaml", *patterns])


@pytest.mark.parametrize(
    ("overrides", "patterns"),
    [
        (["singles.epochs=[]"], [r"singles\.epochs", "at least 1"]),
        (["singles.epochs=[1]", "singles.lr=[0]"], [r"singles\.lr\.0", "greater than 0"]),
        (["singles.epochs=[1]", "singles.rl=[1]"], [r"singles\.rl", "known: epochs, lr"]),
        (["select.method=all"], [r"select\.method", "'best' or 'greedy'"]),
        (["children.0.tau=0.5"], [r"children\.0\.tau", "unknown key"]),
    ],
)
def test_other_mistakes(overrides: list[Any], patterns: list[str]) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        tiny(*overrides)
    must_say(str(caught.value), patterns)
