"""Policies: how members choose together, and paired differences."""

from __future__ import annotations

import copy
import pickle
from importlib.util import find_spec

import numpy as np
import pytest
import torch

from ray_subnets import masks, models, spawning
from ray_subnets.models import actor_critic
from ray_subnets.rl import policies, policy_sweep
from ray_subnets.rl.policies import Played
from ray_subnets.rl.policy_recipes import Env

if find_spec("gymnasium"):
    import played  # noqa: F401 (registers its environments)

gymnasium_only = pytest.mark.skipif(not find_spec("gymnasium"), reason="gymnasium is not installed")
CORRIDOR = Env(id="Corridor-v0", num_envs=6, frame_stack=1)


def logits(*probabilities: list[float]) -> torch.Tensor:
    """`(K, 1, A)` of members that answer one observation."""
    return torch.tensor(probabilities).log()[:, None]


def test_members_choose_together() -> None:
    three = logits([0.9, 0.1, 0.0001], [0.4, 0.6, 0.0001], [0.4, 0.6, 0.0001])
    mean = policies.together(three)[0]
    torch.testing.assert_close(
        mean[:2].float(), torch.tensor([1.7 / 3, 1.3 / 3]), atol=1e-3, rtol=0
    )
    vote = policies.together(three, "vote")[0]
    torch.testing.assert_close(vote.float(), torch.tensor([1 / 3, 2 / 3, 0.0]), atol=1e-5, rtol=0)
    assert int(mean.argmax()) == 0
    assert int(vote.argmax()) == 1
    tie = logits([0.45, 0.55], [0.9, 0.1])
    assert int(policies.together(tie, "vote")[0].argmax()) == 0, "the mean decides between equals"


def test_actions_are_the_most_probable_or_drawn() -> None:
    p = torch.tensor([[0.2, 0.5, 0.3]], dtype=torch.float64).expand(5, 3)
    u = torch.tensor([0.0, 0.19, 0.21, 0.71, 0.9999], dtype=torch.float64)
    assert policies.choose(p, "argmax", u).tolist() == [1] * 5
    assert policies.choose(p, "sample", u).tolist() == [0, 0, 1, 2, 2]
    never = torch.tensor([[0.0, 1.0, 0.0]], dtype=torch.float64).expand(2, 3)
    u = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert policies.choose(never, "sample", u).tolist() == [1, 1]


def test_the_recipes_of_section_4_3_3() -> None:
    model = actor_critic.build("mlp", (4,), 3, {"hidden": [64, 64]}, 0)
    specs = policies.noisy_children(0, sigma=0.05)
    assert len({spec.seed for spec in specs}) == len(specs) == 8
    shapes = masks.maskable(model.actor, classifier=True)
    assert len(shapes) == 3, "every layer of the actor, and none of the critic"
    parent = dict(model.actor.named_parameters())
    for spec in specs:
        weights = dict(spawning.spawn(model.actor, spec).named_parameters())
        off = torch.cat([(weights[name] - parent[name]).detach().flatten() for name in shapes])
        touched = off[off != 0]
        assert len(touched) / len(off) == pytest.approx(0.2, abs=0.03)
        assert float(touched.std()) == pytest.approx(0.05, rel=0.1)


@gymnasium_only
def test_every_environment_plays_the_same_number_of_episodes() -> None:
    def forward(x: torch.Tensor) -> torch.Tensor:
        return torch.tensor([[0.5, 0.5]], dtype=torch.float64).expand(len(x), 2)

    one = policies.play(forward, CORRIDOR, seed=1, episodes=3)
    again = policies.play(forward, CORRIDOR, seed=1, episodes=3)
    other = policies.play(forward, CORRIDOR, seed=2, episodes=3)
    assert one.returns.shape == (3, 6)
    assert ((one.lengths >= 3) & (one.lengths <= 5)).all()
    assert ((one.returns >= 0) & (one.returns <= 3)).all()
    assert len(np.unique(one.levels)) == 18
    assert (one.levels == again.levels).all()
    assert (one.returns == again.returns).all()
    assert (one.levels != other.levels).any()
    same = policies.paired(one, again)
    assert (same.mean, same.low, same.high, same.better, same.worse) == (0.0, 0.0, 0.0, 0, 0)
    with pytest.raises(ValueError, match="did not play the same levels"):
        policies.paired(one, other)


@gymnasium_only
def test_parent_and_ensemble_meet_the_same_levels() -> None:
    model = actor_critic.build("mlp", (2,), 2, {"hidden": [8]}, 0)
    members = [spawning.spawn(model.actor, spec) for spec in policies.noisy_children(0, sigma=2.0)]
    found = policies.compare(
        {
            "parent": policies.Ensemble([model.actor]),
            "mean": policies.Ensemble(members),
            "vote": policies.Ensemble(members, "vote"),
        },
        CORRIDOR,
        seed=4,
        episodes=2,
    )
    assert (found["parent"].levels == found["vote"].levels).all()
    assert (found["parent"].levels == found["mean"].levels).all()
    difference = policies.paired(found["mean"], found["parent"])
    assert difference.pairs == 12
    assert difference.mean == pytest.approx(
        found["mean"].returns.mean() - found["parent"].returns.mean()
    )
    assert difference.low <= difference.mean <= difference.high


@gymnasium_only
def test_an_episode_that_does_not_end_is_named() -> None:
    def stay(x: torch.Tensor) -> torch.Tensor:
        return torch.tensor([[1.0, 0.0]], dtype=torch.float64).expand(len(x), 2)

    with pytest.raises(ValueError, match=r"after 4 steps Corridor-v0 has 6 environments"):
        policies.play(stay, CORRIDOR, seed=0, limit=4)
    with pytest.raises(ValueError, match="episodes: must be at least 1, not 0"):
        policies.play(stay, CORRIDOR, seed=0, episodes=0)


def test_levels_that_are_played_again_are_no_new_evidence() -> None:
    """Two levels, fifty episodes of each that are all alike: the interval is of two numbers."""
    levels = np.tile([3, 8], 50).reshape(1, 100)
    zeros, lengths = np.zeros((1, 100)), np.ones((1, 100), np.int64)
    returns = np.where(levels == 3, 10.0, 30.0)
    off = policies.paired(Played(returns, lengths, levels), Played(zeros, lengths, levels))
    assert (off.pairs, off.levels, off.mean) == (100, 2, 20.0)
    assert (off.low, off.high) == (10.0, 30.0)
    values = np.random.default_rng(0).normal(size=100)
    once = policies.sure(values, np.arange(100))
    assert once == policies.interval(values)
    # Of whole levels, each with its own number of episodes.
    twice = policies.sure(values, np.arange(100) // 4)
    means = values.reshape(25, 4).mean(1)
    assert twice[1] - twice[0] == pytest.approx(4 * means.std() / 5, rel=0.1)


def test_an_interval_over_seeds_covers_what_it_says() -> None:
    """Student's t of three: 4.303 standard errors to each side."""
    low, high = policy_sweep.seeds_interval({"by_seed": [1.0, 2.0, 6.0]}) or (0.0, 0.0)
    assert (low + high) / 2 == pytest.approx(3.0)
    assert (high - low) / 2 == pytest.approx(4.302653 * (7 / 3) ** 0.5)
    assert policy_sweep.seeds_interval({"by_seed": [1.0, 2.0]}) is None


def test_differences_are_paired_and_their_interval_is_of_the_mean() -> None:
    rng = np.random.default_rng(0)
    levels = np.arange(200).reshape(2, 100)
    luck = rng.normal(0, 100, (2, 100))  # of the level: the same for both
    one = Played(luck + 1 + rng.normal(0, 1, (2, 100)), levels, levels)
    other = Played(luck, levels, levels)
    found = policies.paired(one, other)
    error = (one.returns - other.returns).std() / np.sqrt(200)
    assert found.low == pytest.approx(found.mean - 1.96 * error, abs=0.02)
    assert found.high == pytest.approx(found.mean + 1.96 * error, abs=0.02)
    assert found.better + found.worse == found.pairs == 200
    assert found == policies.paired(one, other)
    assert found.low != policies.paired(one, other, seed=1).low


def test_a_policy_can_be_sent_copied_and_changed() -> None:
    actor = models.build("mlp", (3,), 2, {"hidden": [4], "activation": "tanh"}, 0)
    policy, x = policies.Ensemble([actor]), torch.ones(2, 3)
    before = policy(x)
    assert torch.equal(pickle.loads(pickle.dumps(policy))(x), before)
    copied = copy.deepcopy(policy)
    with torch.no_grad():
        for parameter in copied.actors[0].parameters():
            parameter.zero_()
    assert torch.equal(copied(x), torch.full((2, 2), 0.5, dtype=torch.float64))
    assert torch.equal(policy(x), before)


@gymnasium_only
def test_a_policy_that_answers_with_nan_is_told() -> None:
    env = Env(id="Lost-v0", num_envs=2, frame_stack=1)
    policy = policies.Ensemble([models.build("mlp", (2,), 2, {"hidden": [4]}, 0)])
    with pytest.raises(ValueError, match=r"env\.id: a policy answers an observation of Lost-v0"):
        policies.play(policy, env, seed=0)
