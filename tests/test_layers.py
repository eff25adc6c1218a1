"""Imports go down only, and nothing below `distributed/` needs Ray."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "ray_subnets"

# From the ground up; a module may import only what stands before it.
FLOORS = [
    ["rl", "benchmark", "sweeps", "commands", "shifts", "serving"],
    ["memory", "pages", "serving.requested", "inputs", "own_code"],
    ["strangers", "commands.options"],
    ["serving.webapp"],
    [
        *["recipes", "flat", "schedules", "selection", "metrics", "environment", "draws"],
        *["shifts.distortions", "regression"],
    ],
    ["masks", "shifts.blurs", "shifts.shift", "rl.policy_recipes", "rl.simulators"],
    [
        *["noisy", "sparse", "stochastic", "units", "streaming", "shifts.weather"],
        *["rl.procgen_games", "rl.env_processes"],
        *["items", "blueprint", "rl.policy_jobs"],
    ],
    ["topology", "structured", "rl.envs"],
    ["spawning", "flops", "data"],
    [
        *["models.lenet", "models.mlp", "models.resnet", "models.wide_resnet"],
        *["models.densenet", "models.impala", "acting"],
    ],
    ["models", "imagefolders", "shifts.corruptions"],
    ["own_data"],
    [
        *["datasets", "supervised", "answers", "sources", "models.actor_critic", "combining"],
        "batched",
    ],
    ["storage", "trust_region", "shifts.outsiders", "rl.ppo", "rl.policies", "pretrained"],
    ["exporting"],
    ["ensembles"],
    ["regressor"],
    ["checkpoints", "shifts.shifted", "rl.films"],
    ["stored"],
    ["baselines.method", "baselines.fitting", "baselines.exploring"],
    [
        *["baselines.independent", "baselines.dropout", "baselines.trajectory"],
        *["baselines.batch_ensemble", "baselines.tree_net"],
        *["baselines.prune", "baselines.mother_nets"],
    ],
    ["baselines.mimo", "baselines.free_tickets", "baselines.swag"],
    ["baselines"],
    ["population", "summary", "groups", "networks"],
    ["config", "pools", "methods", "rl.policy_worker", "rl.policy_summary", "regression_scores"],
    ["configfile", "checks"],
    ["members", "rl.policyfile"],
    ["cascade", "students"],
    ["driver", "placement", "sweeps.sweepfile", "benchmark.benchmarkfile", "benchmark.bench"],
    ["plan", "sweeps.trials", "benchmark.cells", "rl.policy_run"],
    ["benchmark.run", "rl.policy_members", "rl.policy_cells", "rl.policy_sweepfile"],
    ["plan_table", "sweeps.sweep"],
    ["table", "figures", "evaluation", "events", "progress", "sweeps.dashboard", "benchmark.frame"],
    ["benchmark.columns", "benchmark.figures", "rl.policy_figures", "rl.policy_table"],
    ["benchmark.verdict", "rl.policy_report", "rl.policy_sweep"],
    ["report", "sweeps.sweepreport", "sweeps.sweeptable", "benchmark.table"],
    ["benchmark.report"],
    ["sweeps.sweepmonitor"],
    [
        "distributed",
        "distributed.cluster",
        "distributed.local_cluster",
        "distributed.selection",
        "distributed.devices",
        "distributed.sent",
    ],
    ["distributed.instruments", "distributed.visible", "distributed.clusterfile"],
    ["distributed.children"],
    ["distributed.parent", "distributed.pool", "distributed.reading", "distributed.spreading"],
    ["distributed.run", "distributed.sweepgauges", "distributed.benchmarks", "distributed.serving"],
    ["distributed.policies"],
    ["distributed.sweeps"],
    ["distilling", "api", "commands.benchmark", "commands.policy", "commands.serve"],
    ["commands.sweep", "commands.report"],
    ["commands.keep"],
    ["launch"],
    ["__main__"],
]
FLOOR = {name: level for level, names in enumerate(FLOORS) for name in names}
READERS = {"datasets", "imagefolders", "shifts.corruptions"}
GROUND_FLOOR = [name for names in FLOORS[3:11] for name in names if name not in READERS]
GROUND_FLOOR += ["ensembles", "trust_region", "rl.ppo", "rl.policies"]


def modules() -> dict[str, Path]:
    """Dotted name inside the package -> file."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name:
            found[name] = path
    return found


def imported(path: Path) -> set[str]:
    """Every module that a file imports, anywhere in it, as dotted names."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_every_module_has_a_floor() -> None:
    assert set(modules()) == set(FLOOR)


def test_what_is_installed_is_all_of_it() -> None:
    """A package that is missing here is missing only where nobody develops."""
    settings = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())
    found = {
        ".".join(path.parent.relative_to(PACKAGE.parent).parts)
        for top in (PACKAGE, PACKAGE.parent / "analysis")
        for path in top.rglob("__init__.py")
    }
    assert set(settings["tool"]["setuptools"]["packages"]) == found | {"ray_subnets.configs"}


@pytest.mark.parametrize("name", sorted(FLOOR))
def test_imports_go_down(name: str) -> None:
    ours = {
        target.removeprefix("ray_subnets.")
        for target in imported(modules()[name])
        if target.startswith("ray_subnets.")
    }
    for target in ours & set(FLOOR) - {name}:
        assert FLOOR[target] < FLOOR[name], f"{name} imports {target}"


@pytest.mark.parametrize("name", sorted(FLOOR))
def test_ray_only_in_distributed(name: str) -> None:
    if not name.startswith("distributed"):
        assert not {n for n in imported(modules()[name]) if n.split(".")[0] == "ray"}


@pytest.mark.parametrize("name", GROUND_FLOOR)
def test_the_ground_floor_opens_no_files(name: str) -> None:
    """No paths, clocks, sockets or configuration under the loops (three take times)."""
    allowed = {
        "supervised": {"time"},
        "rl.ppo": {"time"},
        "ensembles": {"time"},
        "environment": {"pathlib", "subprocess", "datetime"},
        "rl.env_processes": {"subprocess", "json", "os", "time"},
    }
    banned = {"pathlib", "os", "time", "datetime", "socket", "pydantic", "subprocess", "json"}
    roots = {n.split(".")[0] for n in imported(modules()[name])}
    assert not (roots & banned) - allowed.get(name, set())


WITHOUT_RAY = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "ray":
            raise ModuleNotFoundError(f"No module named {name!r} (hidden by the test)")
sys.meta_path.insert(0, Absent())
import importlib
for name in sys.argv[1:]:
    importlib.import_module(f"ray_subnets.{name}")
import ray_subnets
for name in ray_subnets.__all__:
    getattr(ray_subnets, name)
assert not [name for name in sys.modules if name.split(".")[0] == "ray"]
try:
    import ray
except ModuleNotFoundError:
    print("ray is absent")
"""


def test_everything_below_imports_with_ray_absent() -> None:
    below = [name for name in FLOOR if not name.startswith("distributed")]
    answer = subprocess.run(
        [sys.executable, "-c", WITHOUT_RAY, *below], capture_output=True, text=True
    )
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.strip() == "ray is absent"


@pytest.mark.parametrize(
    "needed",
    [
        pytest.param("selection, ray_subnets.recipes", id="selection actor"),  # of 60 MB, not 300
        pytest.param("launch", id="help"),  # within 0.2 s, not two
    ],
)
def test_what_must_start_at_once_does_not_load_torch(needed: str) -> None:
    code = f"import sys, ray_subnets.{needed}; print('torch' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert answer.stdout.strip() == "False", answer.stderr
