"""PPO: each formula against numbers worked out by hand, exact resume, and that it learns."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ray_subnets import acting, models, spawning
from ray_subnets.models import actor_critic
from ray_subnets.models.mlp import without_modules
from ray_subnets.recipes import ChildSpec, Training
from ray_subnets.rl import policies, ppo
from ray_subnets.rl.envs import Environments
from ray_subnets.rl.policy_recipes import PPO, Env, Iteration
from ray_subnets.supervised import Diverged
from ray_subnets.topology import Topology

if find_spec("gymnasium"):
    import played  # noqa: F401 (registers its environments)

gymnasium_only = pytest.mark.skipif(not find_spec("gymnasium"), reason="gymnasium is not installed")
procgen_only = pytest.mark.skipif(not find_spec("procgen"), reason="procgen is not installed")

SMALL = PPO(total_steps=10 * 32 * 4, num_steps=32, num_minibatches=4, lr=1e-3, gamma=0.9)
CART = Env(id="CartPole-v1", num_envs=4, frame_stack=2)
SMALL_GAME = Env(id="procgen/coinrun", num_envs=3, num_levels=2, frame_stack=2)
TO_BALANCE = PPO(
    total_steps=100_000,
    num_steps=128,
    num_minibatches=4,
    update_epochs=8,
    lr=2e-3,
    gamma=0.99,
    ent_coef=0.0,
    target_kl=None,
    normalize_reward=False,
    anneal_lr=True,
)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    CART.id: ("mlp", {"hidden": [16], "activation": "tanh"}),
    SMALL_GAME.id: ("impala", {"channels": [4, 4], "hidden": 16}),
}


def column(*values: float) -> torch.Tensor:
    return torch.tensor(values)[:, None]


def test_advantages_as_worked_out_by_hand() -> None:
    rewards, values = column(1.0, 0.0, 2.0), column(0.5, 1.0, 2.0)
    last = torch.tensor([3.0])
    never = torch.zeros(3, 1, dtype=torch.bool)
    advantages, returns = ppo.gae(rewards, values, never, last, gamma=0.9, lam=0.8)
    # Deltas 1.4, 0.8, 2.7; each advantage adds 0.72 times the next.
    torch.testing.assert_close(advantages, column(1.4 + 0.72 * 2.744, 0.8 + 0.72 * 2.7, 2.7))
    torch.testing.assert_close(returns, advantages + values)
    second = torch.tensor([[False], [True], [False]])
    advantages, _ = ppo.gae(rewards, values, second, last, gamma=0.9, lam=0.8)
    # Nothing follows the second step: its delta is 0 - 1.
    torch.testing.assert_close(advantages, column(1.4 - 0.72, -1.0, 2.7))
    # Lambda of 1: discounted sums of rewards.
    _, returns = ppo.gae(rewards, values, never, last, gamma=0.9, lam=1.0)
    torch.testing.assert_close(returns[0], torch.tensor([1 + 0.81 * 2 + 0.729 * 3]))


def test_environments_do_not_mix() -> None:
    generator = torch.Generator().manual_seed(0)
    rewards, values = (torch.randn(7, 3, generator=generator) for _ in range(2))
    ended = torch.rand(7, 3, generator=generator) < 0.3
    last = torch.randn(3, generator=generator)
    together, _ = ppo.gae(rewards, values, ended, last, gamma=0.9, lam=0.8)
    for i in range(3):
        one = slice(i, i + 1)
        alone, _ = ppo.gae(
            *(rewards[:, one], values[:, one], ended[:, one], last[one]), gamma=0.9, lam=0.8
        )
        assert torch.equal(alone, together[:, one])


def test_losses_as_worked_out_by_hand() -> None:
    logits = torch.tensor([[0.0, math.log(3.0)], [0.0, 0.0]])  # p = (1/4, 3/4) and (1/2, 1/2)
    one = ppo.losses(
        logits,
        values=torch.tensor([1.0, 0.1]),
        actions=torch.tensor([1, 0]),
        old_log_probs=torch.tensor([0.5, 0.25]).log(),  # ratios 1.5 and 2
        old_values=torch.tensor([0.5, 0.0]),
        advantages=torch.tensor([2.0, -1.0]),
        returns=torch.tensor([2.0, 0.0]),
        clip=0.2,
        clip_value=0.2,
    )
    # min(3, 1.2 x 2) and min(-2, -1.2): a ratio that went the wrong way is not clipped.
    assert float(one.policy) == pytest.approx(-(2.4 - 2.0) / 2)
    # max((1 - 2)^2, (0.7 - 2)^2) and 0.1^2, which is within the clip.
    assert float(one.value) == pytest.approx(0.5 * (1.69 + 0.01) / 2)
    first = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    assert float(one.entropy) == pytest.approx((first + math.log(2)) / 2)
    assert float(one.approx_kl) == pytest.approx((0.5 - math.log(1.5) + 1 - math.log(2)) / 2)
    assert float(one.clip_fraction) == 1.0


def test_values_are_clipped_where_that_is_asked() -> None:
    one = ppo.losses(
        torch.zeros(1, 2),
        values=torch.tensor([1.0]),
        actions=torch.tensor([0]),
        old_log_probs=torch.tensor([0.5]).log(),
        old_values=torch.tensor([0.5]),
        advantages=torch.ones(1),
        returns=torch.tensor([2.0]),
        clip=0.2,
        clip_value=None,
    )
    assert float(one.value) == pytest.approx(0.5)  # (1 - 2)^2 / 2, and not (0.7 - 2)^2 / 2


def test_actions_that_must_not_be_taken_leave_numbers() -> None:
    logits = torch.tensor([[0.0, math.log(3.0), -math.inf]], requires_grad=True)
    one = ppo.losses(
        logits,
        values=torch.zeros(1),
        actions=torch.tensor([1]),
        old_log_probs=torch.tensor([0.75]).log(),
        old_values=torch.zeros(1),
        advantages=torch.ones(1),
        returns=torch.zeros(1),
        clip=0.2,
        clip_value=0.2,
    )
    expected = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    assert float(one.entropy.detach()) == pytest.approx(expected)
    (one.policy - one.entropy).backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_clipped_samples_have_no_gradient() -> None:
    logits = torch.zeros(2, 2, requires_grad=True)
    one = ppo.losses(
        logits,
        values=torch.zeros(2),
        actions=torch.tensor([0, 0]),
        old_log_probs=torch.tensor([0.25, 0.5]).log(),  # ratios 2 and 1
        old_values=torch.zeros(2),
        advantages=torch.ones(2),
        returns=torch.zeros(2),
        clip=0.2,
        clip_value=0.2,
    )
    one.policy.backward()
    assert logits.grad is not None
    assert logits.grad[0].abs().sum() == 0
    # d ratio / d logit = p (1 - p) / p_old = 1/2, of two samples.
    torch.testing.assert_close(logits.grad[1], torch.tensor([-0.25, 0.25]))


def test_advantages_of_a_minibatch_have_mean_0_and_deviation_1() -> None:
    torch.testing.assert_close(
        ppo.normalized(torch.tensor([1.0, 2.0, 3.0])), torch.tensor([-1.0, 0.0, 1.0])
    )


def test_sampling_follows_the_policy() -> None:
    logits = torch.tensor([0.1, 0.2, 0.7]).log().expand(20_000, 3)
    noise = torch.empty(20_000, 3).exponential_(generator=torch.Generator().manual_seed(0))
    actions, _, _ = ppo.act(lambda x: (x, x[:, 0]), logits, -noise.log().numpy())
    shares = torch.from_numpy(np.bincount(actions, minlength=3)) / 20_000
    torch.testing.assert_close(shares, torch.tensor([0.1, 0.2, 0.7]), atol=0.012, rtol=0)
    chosen = ppo.log_probability(logits[:2], torch.tensor([2, 0]))
    torch.testing.assert_close(chosen, torch.tensor([0.7, 0.1]).log())


def make(
    env: Env, settings: PPO, seed: int = 0
) -> tuple[actor_critic.ActorCritic, Environments, torch.optim.Optimizer]:
    envs = Environments(env, seed, gamma=settings.gamma if settings.normalize_reward else None)
    name, options = MODELS[env.id]
    model = actor_critic.build(name, envs.observation_shape, envs.num_actions, options, seed)
    return model, envs, ppo.make_optimizer(model, settings)


def numbers(report: Iteration) -> Iteration:
    return replace(report, seconds=0.0, rollout_seconds=0.0)


@gymnasium_only
def test_what_is_cut_off_did_not_end_for_the_critic() -> None:
    """Staying put is never rewarded, but after five steps a value of 2 is still to come."""
    envs = Environments(Env(id="Corridor-v0", num_envs=1, frame_stack=1), 0)
    envs.reset()

    def actor(x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return torch.tensor([[50.0, 0.0]]).expand(len(x), 2), None

    def critic(x: torch.Tensor) -> torch.Tensor:
        return torch.full((len(x),), 2.0)

    episodes, settings = ppo.Episodes(), replace(SMALL, num_steps=8)
    rollout = ppo.collect(actor, critic, envs, settings, torch.Generator(), episodes)
    assert rollout.rewards.squeeze(1).tolist() == pytest.approx([0, 0, 0, 0, 0.9 * 2, 0, 0, 0])
    assert rollout.ended.squeeze(1).tolist() == [False] * 4 + [True] + [False] * 3
    assert (episodes.returns, episodes.lengths) == ([0.0], [5])
    assert rollout.last.tolist() == [2.0]
    assert torch.equal(rollout.values, torch.full((8, 1), 2.0))


@gymnasium_only
def test_a_critic_of_its_own_is_asked_once_and_says_the_same() -> None:
    settings = replace(SMALL, num_steps=9)  # of 4 environments: 36 in 4 minibatches
    model, envs, _ = make(CART, settings)
    _, others, _ = make(CART, settings)
    asked: list[int] = []
    actor, critic = ppo.as_asked(model, nullcontext(), {})

    def counted(x: torch.Tensor) -> torch.Tensor:
        asked.append(len(x))
        return critic(x)

    def both(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits, values = model(x)
        return logits, values

    rollouts = []
    for how in ((actor, counted), (both, lambda x: both(x)[1])):
        one = envs if how[0] is actor else others
        one.reset()
        generator = torch.Generator().manual_seed(0)
        rollouts.append(ppo.collect(*how, one, settings, generator, ppo.Episodes()))
    assert asked == [4, 9, 9, 9, 9]  # what came after, and the minibatches
    for name, once, each in zip(ppo.Rollout._fields, *rollouts, strict=True):
        if name in ("values", "last"):
            torch.testing.assert_close(once, each)
        else:
            assert torch.equal(once, each), name


@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_without_modules_a_network_is_the_same(activation: str) -> None:
    network = models.build("mlp", (3, 2), 4, {"hidden": [8, 8], "activation": activation}, 0)
    plain, x = without_modules(network), torch.randn(5, 3, 2)
    assert plain is not network
    assert torch.equal(plain(x), network(x))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.1  # as an optimizer does
    assert torch.equal(plain(x), network(x))


def hooked(layer: nn.Module | None = None) -> nn.Module:
    network = nn.Sequential(nn.Linear(3, 2))
    (layer or network).register_forward_pre_hook(lambda module, given: (2 * given[0],))
    return network if layer is None else nn.Sequential(layer)


@pytest.mark.parametrize(
    "network",
    [
        hooked(),
        hooked(nn.Linear(3, 2)),
        nn.Linear(3, 2),
        nn.Sequential(nn.Linear(3, 2), nn.Dropout()),
        nn.Sequential(nn.Flatten(), type("Mine", (nn.Linear,), {})(3, 2)),
        type("Chain", (nn.Sequential,), {})(nn.Linear(3, 2)),
    ],
    ids=["hook", "hook of a layer", "layer", "dropout", "own layer", "own chain"],
)
def test_other_networks_are_asked_as_they_are(network: nn.Module) -> None:
    assert without_modules(network) is network


@gymnasium_only
def test_layers_that_draw_or_look_around_act_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropout is the same in every process that trains, and one environment is enough for batch
    normalisation; who acts does not depend on who acts beside it."""
    settings = replace(SMALL, total_steps=3 * 32, num_minibatches=2)
    found = []
    for before in (0, 5):
        torch.manual_seed(before)
        envs = Environments(replace(CART, num_envs=1), 0)
        layers = lambda outputs: nn.Sequential(  # noqa: E731
            *(nn.Flatten(), nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(0.3)),
            nn.Linear(16, outputs),
        )
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = actor_critic.ActorCritic(layers(2), layers(1))
        optimizer = ppo.make_optimizer(model, settings)
        for _ in ppo.train(model, envs, settings, optimizer, seed=3):
            pass
        found.append({k: v.clone() for k, v in model.state_dict().items()})
    for name, tensor in found[0].items():
        assert torch.equal(tensor, found[1][name]), name


@gymnasium_only
def test_a_last_observation_that_is_not_a_number_is_named() -> None:
    envs = Environments(Env(id="Leaving-v0", num_envs=1, frame_stack=1), 0)
    envs.reset()
    settings = replace(SMALL, num_steps=8)
    actor = lambda x: (torch.tensor([[50.0, 0.0]]).expand(len(x), 2), None)  # noqa: E731
    critic = lambda x: torch.zeros(len(x))  # noqa: E731
    with pytest.raises(ValueError, match=r"Leaving-v0 gave a last observation .*environment 0, st"):
        ppo.collect(actor, critic, envs, settings, torch.Generator(), ppo.Episodes())


def test_masks_of_the_actor_act_in_a_rollout() -> None:
    model = actor_critic.build("mlp", (3,), 2, {"hidden": [4]}, 0)
    x = torch.ones(5, 3)
    whole = ppo.as_asked(model, nullcontext(), {})[0](x)[0]
    bias = torch.tensor([7.0, -7.0])
    masked, values = ppo.as_asked(model, nullcontext(), {"actor.3.bias": bias})[0](x)
    assert values is None
    torch.testing.assert_close(masked - whole, bias.expand(5, 2))


@pytest.mark.parametrize(
    "env",
    [
        pytest.param(CART, marks=gymnasium_only, id="cartpole"),
        pytest.param(SMALL_GAME, marks=procgen_only, id="coinrun"),
    ],
)
def test_killed_and_resumed_equals_unkilled_bit_for_bit(env: Env) -> None:
    settings = replace(SMALL, total_steps=6 * 32 * env.num_envs, anneal_lr=True)
    model, envs, optimizer = make(env, settings)
    whole = [numbers(r) for r in ppo.train(model, envs, settings, optimizer, seed=5)]
    other, envs, optimizer = make(env, settings)
    first = []
    for report in ppo.train(other, envs, settings, optimizer, seed=5):
        first.append(numbers(report))
        if report.iteration == 3:
            break
    state = {k: v.clone() for k, v in ppo.training_state(other, optimizer, envs).items()}
    assert all(isinstance(tensor, torch.Tensor) for tensor in state.values())
    third, envs, optimizer = make(env, settings, seed=0)
    nn.init.zeros_(next(third.parameters()))
    said: list[str] = []
    ppo.restore_training_state(third, optimizer, envs, state, said.append)
    rest = ppo.train(third, envs, settings, optimizer, seed=5, start_iteration=3)
    assert first + [numbers(r) for r in rest] == whole
    assert not said
    assert len(whole) == 6
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, third.state_dict()[name]), name


@gymnasium_only
def test_passes_stop_where_the_policy_has_moved_far_enough() -> None:
    def passes(target: float | None) -> list[int]:
        settings = replace(SMALL, target_kl=target, lr=3e-3, update_epochs=4)
        model, envs, optimizer = make(CART, settings)
        return [r.passes for r in ppo.train(model, envs, settings, optimizer)]

    assert set(passes(None)) == {4}
    assert set(passes(0.0)) == {1}
    assert 10 < sum(passes(0.003)) < 40


@gymnasium_only
def test_a_network_that_learns_too_fast_has_diverged() -> None:
    settings = replace(SMALL, lr=1e30)
    model, envs, optimizer = make(CART, settings)
    with pytest.raises(Diverged, match="policy: a loss is not finite in iteration 1; lower its lr"):
        list(ppo.train(model, envs, settings, optimizer))


@gymnasium_only
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"total_steps": 100}, r"ppo\.total_steps: 100 is less than one rollout, 128"),
        ({"num_minibatches": 65}, r"ppo\.num_minibatches: 65 of 128 samples"),
    ],
)
def test_a_rollout_that_cannot_be_learnt_from_is_one_line(
    change: dict[str, Any], words: str
) -> None:
    settings = replace(SMALL, **change)
    model, envs, optimizer = make(CART, settings)
    with pytest.raises(ValueError, match=words):
        next(ppo.train(model, envs, settings, optimizer))


@gymnasium_only
def test_a_network_that_does_not_take_the_observations_is_one_line() -> None:
    with pytest.raises(ValueError, match="IMPALA needs images") as caught:
        actor_critic.build("impala", (8,), 2, {}, 0)
    assert "\n" not in str(caught.value)


def child(method: str, **options: Any) -> ChildSpec:
    return ChildSpec(
        id="child",
        method=method,
        seed=1,
        density=0.5,
        draw="exact",  # type: ignore[arg-type]
        training=Training(epochs=10),
        **options,
    )


def tuned(spec: ChildSpec, settings: PPO) -> tuple[dict[str, torch.Tensor], Topology]:
    model, envs, optimizer = make(CART, settings)
    parent = {name: tensor.clone() for name, tensor in model.actor.state_dict().items()}
    body = spawning.anatomy(model.actor, spec, envs.observation_shape)
    made = spawning.spawn_weights(parent, body, spec)
    model.actor.load_state_dict(made.weights)
    topology = acting.topology(spec, made.subnetwork, body, dict(model.actor.named_parameters()))
    assert topology is not None
    reports = list(ppo.train(model, envs, settings, optimizer, topology=topology))
    assert len(reports) == 10
    after = {name: tensor.clone() for name, tensor in model.actor.state_dict().items()}
    assert any(not torch.equal(after[name], made.weights[name]) for name in after)
    return after, topology


@gymnasium_only
@pytest.mark.parametrize(
    "spec",
    [
        child("sparse"),
        child("stochastic", tau=0.5, anneal_epochs=5.0),
    ],
    ids=["sparse", "stochastic"],
)
def test_children_keep_their_subnetwork_while_ppo_tunes_them(spec: ChildSpec) -> None:
    after, topology = tuned(spec, SMALL)
    for name, mask in topology.masks.items():
        assert (after[name][~mask] == 0).all()
        assert (after[name][mask] != 0).all()


@gymnasium_only
def test_mixed_precision_learns_on_and_keeps_float32_weights() -> None:
    settings = replace(SMALL, precision="bfloat16")
    model, envs, optimizer = make(CART, settings)
    reports = list(ppo.train(model, envs, settings, optimizer))
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}
    plain, envs, optimizer = make(CART, SMALL)
    others = list(ppo.train(plain, envs, SMALL, optimizer))
    assert numbers(reports[0]) != numbers(others[0])
    assert reports[0].entropy == pytest.approx(others[0].entropy, abs=0.02)


@gymnasium_only
def test_it_learns_to_balance_a_pole() -> None:
    """A random policy keeps it up for some 22 steps. Within 100,000 steps a whole rollout's
    episodes must last 195, which was the mark at which the first version of the task was solved;
    some 20,000 are enough.
    """
    settings = TO_BALANCE
    env = Env(id="CartPole-v1", num_envs=16, frame_stack=1)
    envs = Environments(env, 0)
    model = actor_critic.build("mlp", (4,), 2, {"hidden": [64, 64], "activation": "tanh"}, 0)
    means: list[float] = []
    for report in ppo.train(model, envs, settings, ppo.make_optimizer(model, settings), seed=0):
        if len(report.returns) >= 5:
            means.append(sum(report.returns) / len(report.returns))
        if means[-1] >= 195:
            break
    assert means[0] < 50
    assert means[-1] >= 195
    policy = policies.Ensemble([model.actor])
    played = policies.play(policy, env, seed=99, how="argmax")
    assert played.returns.mean() > 100, "and it is the actor that acts"


@gymnasium_only
def test_what_the_benchmark_compares_with_learns_too() -> None:
    from analysis.benchmarks import plain_ppo

    env = Env(id="CartPole-v1", num_envs=16, frame_stack=1)
    model = actor_critic.build("mlp", (4,), 2, {"hidden": [64, 64], "activation": "tanh"}, 0)
    envs = plain_ppo.make(env.id, env.num_envs, TO_BALANCE.gamma)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        plain_ppo.train(model, envs, replace(TO_BALANCE, total_steps=20_480), torch.device("cpu"))
    envs.close()
    played = policies.play(policies.Ensemble([model.actor]), env, seed=99, how="argmax")
    assert played.returns.mean() > 100
