"""A policy's run in this process: settings, jobs, exact resume, episodes side by side, report."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Command
from tiny import equal, numbers

import ray_subnets
from ray_subnets.checkpoints import RunFolder
from ray_subnets.models import actor_critic
from ray_subnets.pools import SerialPool
from ray_subnets.recipes import Epoch, Result
from ray_subnets.rl import (
    policies,
    policy_report,
    policy_run,
    policy_summary,
    policy_worker,
    policyfile,
)
from ray_subnets.rl.envs import RunningReturn
from ray_subnets.rl.policies import Played
from ray_subnets.rl.policy_jobs import Member, Player, split
from ray_subnets.rl.policy_recipes import Env
from ray_subnets.rl.policy_worker import PolicyWorker
from ray_subnets.rl.policyfile import PolicyConfig

if find_spec("gymnasium"):
    import played  # noqa: F401 (registers its environments)

gymnasium_only = pytest.mark.skipif(not find_spec("gymnasium"), reason="gymnasium is not installed")
procgen_only = pytest.mark.skipif(not find_spec("procgen"), reason="procgen is not installed")

PICTURE = """
name: picture
env: {id: Picture-v0, num_envs: 4, num_levels: 30, frame_stack: 1}
model: {name: mlp, hidden: [8], activation: tanh}
ppo: {total_steps: 128, num_steps: 8, num_minibatches: 2, gamma: 0.9, lr: 0.01}
children:
  - {method: noisy, count: 3, sigma: 0.3, density: 0.5}
  - {method: sparse, count: 2, partition: 2, tune: {total_steps: 64}}
  - {method: stochastic, count: 1, sparsity: 0.5, anneal_steps: 48, tune: {total_steps: 96}}
evaluate: {episodes: 12, per_job: 4, film: 6}
"""


def picture(*overrides: str) -> PolicyConfig:
    return policyfile.parse(PICTURE, "picture.yaml", overrides)


def worker(config: PolicyConfig, folder: RunFolder) -> PolicyWorker:
    return PolicyWorker(config.task(str(folder)), policy_run.check(config))


def run_policy(config: PolicyConfig, folder: RunFolder, **how: Any) -> dict[str, Any]:
    """A whole run in this process."""
    policy_run.prepare(config, folder)
    pool = SerialPool(worker(config, folder))
    return policy_run.run(config, policy_run.check(config), folder, pool, **how)


# --- settings -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("env.num_envs=0", "env.num_envs: input should be greater than or equal to 1, not 0"),
        ("env.mode=easy", "env.mode: unknown key; known: id, num_envs, distribution_mode"),
        ("ppo.lrr=1", r"ppo.lrr: unknown key; did you mean lr\?"),
        ("ppo.total_steps=31", "ppo.total_steps: 31 is less than one rollout, 32"),
        ("children.1.tune.total_steps=5", "children.1.tune.total_steps: 5 is less than one"),
        ("children.1.tune={lr: 0.1}", "children.1.tune.total_steps: required, but missing"),
        ("children.0.structure=unit", "children.0.structure: is for classifiers"),
        ("children.0={method: noisy, count: 1, kl_target: 1}", "children.0.kl_target: needs valid"),
        ("children.2.anneal_steps=97", "children.2.anneal_steps: 97 is more than tune.total_steps"),
        ("children.0.count=0", "children.0.count: input should be greater than or equal to 1"),
        ("evaluate.episodes=9", "evaluate.episodes: input should be greater than or equal to 10"),
        ("evaluate.levels=[unseen] env.num_levels=0", "env.num_levels: with all levels in train"),
        ("children.0.name=parent", "children.name: 'parent' is taken"),
        ("evaluate.combine=[vote,vote]", "evaluate.combine: vote, vote: name each once"),
    ],
)
def test_what_is_wrong_with_settings_is_one_line(override: str, line: str) -> None:
    overrides = [override] if " " in override and "=[" not in override else override.split(" ")
    with pytest.raises(ValueError, match=line) as error:
        picture(*overrides)
    assert len(str(error.value).splitlines()) == 1


def test_settings_say_the_same_when_written_and_read() -> None:
    config = picture()
    assert policyfile.parse(config.to_yaml(), "again") == config
    tuned = {job.id: job for job in config.child_jobs()}
    assert set(tuned) == {"sparse-000", "sparse-001", "stochastic-000"}
    assert tuned["sparse-000"].ppo.lr == config.ppo.lr, "what tune leaves out is the run's own"
    assert tuned["sparse-000"].epochs == 2
    assert tuned["stochastic-000"].spec.anneal_epochs == 1.5
    assert all(spec.mask_classifier for spec in config.specs())


@gymnasium_only
@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["env.id=procgen/coinrum"], "env.id: ProcGen has no game 'coinrum'; it has bigfish"),
        (["env.id=Graph-v0"], "env.id: 'Graph-v0' has observations Dict"),
        (["env.id=Steering-v0"], "env.id: 'Steering-v0' has actions Box"),
        (["env.id=Nowhere-v0"], "env.id: 'Nowhere-v0' cannot be made"),
        (["model={name: impala}", "env.id=CartPole-v1"], r"model: IMPALA needs images, not \(4,\)"),
    ],
)
def test_what_cannot_be_played_is_one_line(overrides: list[str], line: str) -> None:
    with pytest.raises(ValueError, match=line) as error:
        policy_run.check(picture(*overrides))
    assert len(str(error.value).splitlines()) == 1


def test_without_procgen_the_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "procgen", None)
    with pytest.raises(ValueError, match=r"install ray_subnets\[rl\] \(0.10.7 is there for Python"):
        policy_run.check(picture("env.id=procgen/coinrun"))


@gymnasium_only
def test_the_command_line_ends_with_one_line_and_2(command: Command, tmp_path: Path) -> None:
    (tmp_path / "picture.yaml").write_text(PICTURE)
    done = command("run", "picture.yaml", "env.id=CartPole-v7", "--serial", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("ray-subnets: env.id: 'CartPole-v7' cannot be made:")
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "runs").exists(), "nothing is written for a run that cannot begin"


# --- who plays ----------------------------------------------------------------------------------


def test_128_children_are_played_in_jobs_of_a_few_networks() -> None:
    config = picture("children.0.count=128", "evaluate.per_job=8")
    early = policy_run.matches(config, {}, tuned=False)
    assert set(early) == {
        (levels, choose) for levels in ("train", "unseen") for choose in ("sample", "argmax")
    }
    for some in early.values():
        names = [player.name for match in some for player in match.players]
        assert len(set(names)) == len(names)
        assert sum(name.startswith("noisy-") for name in names) == 128
        for match in some:
            asked = sum(len(player.members) for player in match.players)
            assert asked <= 8 or len(match.players) == 1
            assert match.seed == some[0].seed
            assert match.env == some[0].env
    assert len({match.id for some in early.values() for match in some}) == 4 * (17 + 2)


def test_an_ensemble_is_never_divided() -> None:
    sizes = [1, 1, 5, 12, 1, 3, 3]
    who = [Player(name=str(i), kind="child", members=(Member(),) * n) for i, n in enumerate(sizes)]
    parts = split(who, 6)
    assert [[int(one.name) for one in part] for part in parts] == [[0, 1], [2], [3], [4, 5], [6]]


def test_differences_and_scaled_returns_as_worked_out_by_hand() -> None:
    levels = np.arange(10)[None]
    game = Env(id="procgen/starpilot")

    def line(kind: Any, name: str, returns: list[float], group: str = "") -> policy_summary.Line:
        played = Played(np.array([returns]), np.full((1, 10), 3), levels)
        return policy_summary.Line(Player(name=name, kind=kind, group=group), played)

    lines = [
        line("parent", "parent", [2.5] * 10),
        line("child", "a", [64.0] * 10, "noisy"),
        line("child", "b", [2.5] * 5 + [1.0] * 5, "noisy"),
    ]
    rows = policy_summary.evaluation({("unseen", "sample"): lines}, {"unseen": game}, 0)[0]
    found = {row["name"]: row for row in rows["players"]}
    assert found["parent"]["normalised"]["mean"] == 0
    assert found["parent"]["difference"] is None
    assert found["a"]["normalised"]["mean"] == found["a"]["normalised"]["low"] == 1
    assert found["a"]["difference"]["mean"] == 61.5
    off = found["b"]["difference"]
    assert (off["mean"], off["better"], off["worse"], off["pairs"]) == (-0.75, 0, 5, 10)
    assert off["low"] <= -0.75 <= off["high"] <= 0
    mean = found["noisy child"]
    assert mean["mean"] == pytest.approx((64 + 1.75) / 2)
    assert mean["difference"]["mean"] == pytest.approx((61.5 - 0.75) / 2)


# --- a run --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunFolder, dict[str, Any]]:
    pytest.importorskip("gymnasium")
    folder = RunFolder.create(tmp_path_factory.mktemp("runs") / "picture")
    return folder, run_policy(picture(), folder)


def test_everyone_plays_the_same_levels(finished: tuple[RunFolder, dict[str, Any]]) -> None:
    folder, record = finished
    assert [(one["levels"], one["choose"]) for one in record["evaluation"]] == [
        *(("train", "sample"), ("train", "argmax"), ("unseen", "sample"), ("unseen", "argmax"))
    ]
    for one in record["evaluation"]:
        names = [player["name"] for player in one["players"]]
        assert len(set(names)) == len(names)
        for group in ("noisy", "sparse", "stochastic", "all"):
            assert {f"{group}, mean", f"{group}, vote"} <= set(names)
        assert ("random" in names) == (one["choose"] == "sample")
        levels = set()
        for player in one["players"]:
            assert player["episodes"] == 12
            assert player["low"] <= player["mean"] <= player["high"]
            if player["file"]:
                arrays = folder.load_arrays(player["file"]["file"])
                levels.add(tuple(arrays[f"{player['name']}/levels"].reshape(-1).tolist()))
        (same,) = levels
        assert all((level < 30) == (one["levels"] == "train") for level in same)
    assert record["cost"]["parent_steps"] == 128
    assert record["cost"]["tuning_steps"] == 64 + 64 + 96
    assert record["cost"]["playing_steps"] == sum(match["steps"] for match in record["matches"])
    assert folder.read_json("result.json") == json.loads(json.dumps(record))


def test_same_seed_same_numbers(finished: tuple[RunFolder, dict[str, Any]], tmp_path: Path) -> None:
    again = run_policy(picture(), RunFolder.create(tmp_path / "again"))
    assert plain(again) == plain(finished[1])
    other = run_policy(picture("seed=1"), RunFolder.create(tmp_path / "other"))
    assert plain(other)["evaluation"] != plain(again)["evaluation"]


def plain(record: dict[str, Any]) -> dict[str, Any]:
    """Without clocks, and without the hash of curves, which have some."""
    found: dict[str, Any] = numbers(record)
    for one in [found["parent"], *(child["tuned"] for child in found["children"])]:
        if one:
            one.pop("curve")
    return found


def curve_of(folder: RunFolder, id: str) -> list[Any]:
    """A learning curve without its clock."""
    times = ("seconds", "rollout_seconds")
    records = folder.read_json(f"curves/{id}.json")
    return [{key: one[key] for key in one if key not in times} for one in records]


@pytest.mark.parametrize("stopped", ["parent", "sparse-001", "stochastic-000"])
def test_killed_and_resumed_training_gives_the_same_curve(
    stopped: str,
    finished: tuple[RunFolder, dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(policy_worker, "EVERY", 0.0)
    folder, seen = RunFolder.create(tmp_path / "run"), []

    class Killed(Exception):
        pass

    def die(report: Any) -> None:
        if isinstance(report, Epoch) and (report.id, report.epoch) == (stopped, 2):
            raise Killed

    length = len(curve_of(finished[0], stopped))
    with pytest.raises(Killed):
        run_policy(picture(), folder, listen=die)
    assert not folder.exists(f"curves/{stopped}.json")
    record = run_policy(
        picture(), folder, listen=lambda r: seen.append(r) if isinstance(r, Epoch) else None
    )
    first = next(one.epoch for one in seen if one.id == stopped)
    assert first == min(3, length), "from the last checkpoint, not from the start"
    assert plain(record) == plain(finished[1])
    for id in ("parent", "sparse-000", "sparse-001", "stochastic-000"):
        assert curve_of(folder, id) == curve_of(finished[0], id)
    name = "parent.safetensors" if stopped == "parent" else f"children/{stopped}.safetensors"
    assert equal(folder.load_tensors(name), finished[0].load_tensors(name))


def test_a_finished_run_does_nothing_when_resumed(
    finished: tuple[RunFolder, dict[str, Any]],
) -> None:
    folder, record = finished
    seen: list[Any] = []
    again = run_policy(policy_run.config_of(folder), folder, listen=seen.append)
    assert plain(again) == plain(record)
    assert all(isinstance(one, Result) for one in seen)
    assert len({one.id for one in seen}) == len(seen) == len(policy_run.jobs(picture()))


def test_sparse_children_stay_sparse_and_are_stored_as_such(
    finished: tuple[RunFolder, dict[str, Any]],
) -> None:
    folder, _ = finished
    loaded = ray_subnets.load_policy(str(folder), "sparse")
    first, second = (dict(actor.named_parameters()) for actor in loaded.actors)
    for name in first:
        if name.endswith("weight"):
            assert not ((first[name] != 0) & (second[name] != 0)).any(), "two halves of one draw"
            assert (first[name] != 0).float().mean() == pytest.approx(0.5, abs=0.05)


def test_children_are_tuned_on_the_parents_scale_of_rewards(
    finished: tuple[RunFolder, dict[str, Any]], tmp_path: Path
) -> None:
    """Its critic knows no other; what the scale is stands beside its weights."""
    folder, record = finished
    tensors = folder.load_tensors("parent.safetensors")
    moments = tensors[policy_worker.MOMENTS]
    assert moments.tolist()[2] == pytest.approx(128, abs=0.01)
    assert record["parent"]["weights"]["file"] == "parent.safetensors"
    doing = worker(picture(), RunFolder.create(tmp_path / "other"))
    began: list[list[float]] = []

    class Seen(RunningReturn):
        def __call__(self, *given: Any) -> Any:
            began.append(self.moments.tolist())
            return super().__call__(*given)

    doing.parent = tensors
    job = next(job for job in picture().child_jobs() if job.id.startswith("sparse"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ray_subnets.rl.envs.RunningReturn", Seen)
        patch.setattr(policy_worker, "load_checkpoint", lambda *given: (0, 0, 0.0))
        assert list(doing._tuned(job))
    assert began[0] == moments.tolist()


def test_networks_of_users_keep_the_weights_they_are_made_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine_actor.py").write_text(
        "from torch import nn\n"
        "def make(num_classes):\n"
        "    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 8), nn.Tanh(), "
        "nn.Linear(8, num_classes))\n"
        "    nn.init.constant_(net[1].weight, 0.25)\n"
        "    return net\n"
        "def fixed():\n"
        "    return nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    made = actor_critic.build("mine_actor:make", (4,), 2, {}, 0)
    for network in (made.actor, made.critic):
        assert bool((network.get_parameter("1.weight") == 0.25).all())
    with pytest.raises(ValueError, match=r"model: 'mine_actor:fixed' makes the critic too"):
        actor_critic.build("mine_actor:fixed", (4,), 2, {}, 0)


def test_the_policy_that_is_kept_plays_as_in_the_record(
    finished: tuple[RunFolder, dict[str, Any]],
) -> None:
    folder, record = finished
    unseen = next(one for one in record["evaluation"] if one["levels"] == "unseen")
    kept = {player["name"]: player for player in unseen["players"]}
    env = picture().level_sets()["unseen"]
    seed = policy_run.matches(picture(), {}, tuned=False)["unseen", "sample"][0].seed
    for name, policy in {
        "noisy, mean": ray_subnets.load_policy(str(folder)),
        "stochastic, vote": ray_subnets.load_policy(str(folder), "stochastic", combine="vote"),
        "parent": ray_subnets.load_policy(str(folder), "parent"),
    }.items():
        played = policies.play(policy, env, seed=seed)
        assert played.returns.mean() == kept[name]["mean"]
    with pytest.raises(
        ValueError, match="has no 'dense'; it has parent, noisy, sparse, stochastic"
    ):
        ray_subnets.load_policy(str(folder), "dense")


def test_the_report_has_curves_tables_and_the_film(
    finished: tuple[RunFolder, dict[str, Any]],
) -> None:
    from PIL import Image

    folder, record = finished
    assert record["film"] == {"file": "film.gif", "levels": "unseen", "error": None}
    with Image.open(folder.root / "film.gif") as film:
        assert film.n_frames in range(2, 7)  # equal pictures that follow each other are one
    page = Path(policy_report.write(folder)).read_text()
    assert "data:image/gif;base64,R0lGOD" in page
    assert page.count("<svg") == 4
    assert "unseen levels, most probable actions, 12 episodes" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    for child in record["children"]:
        assert child["id"] in page


@gymnasium_only
def test_a_run_without_pictures_says_so_and_goes_on(tmp_path: Path) -> None:
    config = picture(
        "env.id=Corridor-v0", "children=[{method: noisy, count: 2, sigma: 0.1}]", "seed=3"
    )
    folder = RunFolder.create(tmp_path / "run")
    record = run_policy(config, folder)
    assert record["film"]["error"] == "evaluate.film: Corridor-v0 draws no pictures; set it to 0"
    assert "no film: evaluate.film: Corridor-v0" in Path(policy_report.write(folder)).read_text()


@gymnasium_only
def test_an_environment_of_a_module_is_played_and_filmed_in_processes_too(
    tmp_path: Path, finished: tuple[RunFolder, dict[str, Any]]
) -> None:
    folder = RunFolder.create(tmp_path / "run")
    record = run_policy(picture("env.id=played:Picture-v0", "env.processes=2"), folder)
    _, before = finished
    assert [one["players"] for one in record["evaluation"]] == [
        one["players"] for one in before["evaluation"]
    ]
    assert record["film"] == before["film"]


@gymnasium_only
def test_a_film_that_cannot_be_made_costs_no_run(tmp_path: Path) -> None:
    noisy = "children=[{method: noisy, count: 2, sigma: 0.1}]"
    folder = RunFolder.create(tmp_path / "run")
    record = run_policy(picture("env.id=Blind-v0", "env.options={place: here}", noisy), folder)
    error = record["film"]["error"]
    assert error.startswith("evaluate.film: Blind-v0 raised NotImplementedError: too dark (")
    assert "no film" in Path(policy_report.write(folder)).read_text()


@gymnasium_only
def test_a_policy_takes_what_the_environment_gives(
    finished: tuple[RunFolder, dict[str, Any]],
) -> None:
    policy = ray_subnets.load_policy(str(finished[0].root), "parent")
    images = np.random.default_rng(0).integers(0, 256, (3, 1, 5, 4)).astype(np.uint8)
    torch.testing.assert_close(policy(images), policy(torch.from_numpy(images).float() / 255))
    with pytest.raises(ValueError, match=r"must be \(N, 1, 5, 4\) as in training"):
        policy(images[0])
    whole = np.array([[1, 0], [0, 1]], np.int8)
    linear = policies.Ensemble([torch.nn.Linear(2, 3)], shape=(2,))
    for same in (whole, whole.astype(np.uint8), whole.astype(np.float64), whole * 1.0):
        torch.testing.assert_close(linear(same), linear(torch.from_numpy(whole).float()))


@gymnasium_only
def test_where_environments_are_stepped_is_no_part_of_a_job(tmp_path: Path) -> None:
    from ray_subnets import stored
    from ray_subnets.rl.policy_sweepfile import parent_id

    one, two = picture(), picture("env.processes=2", "env.threads=3")
    assert torch.equal(stored._digest(one.parent_job()), stored._digest(two.parent_job()))
    assert parent_id(one) == parent_id(two)
    other = picture("env.num_envs=5").parent_job()
    assert not torch.equal(stored._digest(one.parent_job()), stored._digest(other))


@gymnasium_only
def test_commands_for_classifiers_refuse_a_policys_run(
    command: Command, finished: tuple[RunFolder, dict[str, Any]]
) -> None:
    folder, _ = finished
    done = command("grow", str(folder), "--to", "9")
    assert done.returncode == 2
    assert "grow:" in done.stderr
    assert "is a policy's run" in done.stderr
    done = command("report", str(folder))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("report.html")


@procgen_only
def test_a_game_of_procgen_from_config_to_report(tmp_path: Path) -> None:
    config = policyfile.parse(
        """
name: coinrun
env: {id: procgen/coinrun, num_envs: 2, num_levels: 5}
model: {name: impala, channels: [4, 4], hidden: 16}
ppo: {total_steps: 64, num_steps: 16, num_minibatches: 2}
children: [{method: noisy, count: 2, sigma: 0.05, density: 0.2}]
evaluate: {episodes: 10, levels: [unseen], choose: [sample], combine: [probabilities], film: 4}
""",
        "coinrun.yaml",
    )
    folder = RunFolder.create(tmp_path / "run")
    record = run_policy(config, folder)
    (one,) = record["evaluation"]
    for player in one["players"]:
        assert player["normalised"]["mean"] == pytest.approx((player["mean"] - 5) / 5)
    assert record["film"]["file"] == "film.gif"
    assert "scaled" in Path(policy_report.write(folder)).read_text()
    torch.testing.assert_close(
        ray_subnets.load_policy(str(folder))(torch.zeros(1, 6, 64, 64, dtype=torch.uint8)).sum(),
        torch.tensor(1.0, dtype=torch.float64),
    )
