"""Train a policy by proximal policy optimisation, in one process on one device.

The loop is a generator like `supervised.train`: collect a rollout, estimate advantages, update,
yield. All randomness of an iteration follows from (seed, iteration), so a policy whose weights,
optimizer and environments were saved goes on exactly as if it had not stopped.

Sources: [PPO] Schulman et al. 2017; [GAE] Schulman et al. 2016; [37] Huang et al. 2022, "The 37
implementation details of PPO", numbered as there. Legend: T steps of a rollout, E environments,
A actions, B = T E samples.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from ray_subnets import supervised
from ray_subnets.models.actor_critic import ActorCritic, to_input
from ray_subnets.models.mlp import without_modules
from ray_subnets.recipes import derive
from ray_subnets.rl.envs import Environments
from ray_subnets.rl.policy_recipes import PPO, Iteration
from ray_subnets.rl.simulators import Array
from ray_subnets.supervised import Diverged
from ray_subnets.topology import Topology

# --- the algorithm, as functions of tensors -----------------------------------------------------


def gae(
    rewards: Tensor, values: Tensor, ended: Tensor, last: Tensor, *, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantages [GAE, eq. 16] and the returns that the critic learns [37, 5].

        delta_t = r_t + gamma V(s_t+1) - V(s_t),  A_t = delta_t + gamma lambda A_t+1

    where nothing follows the end of an episode.

    Args:
        rewards, values: `(T, E)`.
        ended: `(T, E)` bool: the episode ended with this step.
        last: `(E,)` value of the state after the last step.

    Returns:
        Advantages and advantages + values, `(T, E)` each.
    """
    advantages = torch.empty_like(rewards)
    goes_on = 1.0 - ended.to(rewards.dtype)
    following, advantage = last, torch.zeros_like(last)
    for t in range(len(rewards) - 1, -1, -1):
        delta = rewards[t] + gamma * following * goes_on[t] - values[t]
        advantage = delta + gamma * lam * goes_on[t] * advantage
        advantages[t] = advantage
        following = values[t]
    return advantages, advantages + values


def normalized(advantages: Tensor) -> Tensor:
    """Mean 0 and standard deviation 1 in a minibatch [37, 7]."""
    return (advantages - advantages.mean()) / (advantages.std() + 1e-8)


class Losses(NamedTuple):
    """Scalars of a minibatch; the last two are not trained on."""

    policy: Tensor
    value: Tensor
    entropy: Tensor
    approx_kl: Tensor
    clip_fraction: Tensor


def losses(
    logits: Tensor,
    values: Tensor,
    actions: Tensor,
    old_log_probs: Tensor,
    old_values: Tensor,
    advantages: Tensor,
    returns: Tensor,
    *,
    clip: float,
    clip_value: float | None,
) -> Losses:
    """The clipped surrogate [PPO, eq. 7] and the clipped value loss [37, 9], to be made small.

    The divergence is estimated by `mean(r - 1 - log r)`, unbiased and never negative (Schulman
    2020, "Approximating KL divergence"; [37, 12]).

    Args:
        logits: `(n, A)`, -inf of actions that must not be taken; all others `(n,)`.
        clip_value: None: values are not clipped.
    """
    log_probs = logits.log_softmax(1)
    log_ratio = log_probability(logits, actions) - old_log_probs
    ratio = log_ratio.exp()
    surrogate = torch.min(advantages * ratio, advantages * ratio.clamp(1 - clip, 1 + clip))
    off = (values - returns) ** 2
    if clip_value is not None:
        near = old_values + (values - old_values).clamp(-clip_value, clip_value)
        off = torch.max(off, (near - returns) ** 2)
    value = 0.5 * off.mean()
    least = torch.finfo(log_probs.dtype).min  # 0 times -inf is no number
    entropy = -(log_probs.exp() * log_probs.clamp_min(least)).sum(1).mean()
    with torch.no_grad():
        approx_kl = (ratio - 1 - log_ratio).mean()
        clipped = ((ratio - 1).abs() > clip).float().mean()
    return Losses(-surrogate.mean(), value, entropy, approx_kl, clipped)


# --- collecting ---------------------------------------------------------------------------------

Forward = Callable[[Tensor], tuple[Tensor, Tensor]]
"""observations `(N, *shape)` -> logits `(N, A)`, values `(N,)`, float32"""
Actor = Callable[[Tensor], tuple[Tensor, Tensor | None]]
"""the same; without values where it costs more to have them at each step than all at once"""
Critic = Callable[[Tensor], Tensor]
"""observations -> values alone"""


class Rollout(NamedTuple):
    """On the device, `(T, E, ...)`."""

    observations: Tensor
    actions: Tensor
    log_probs: Tensor
    values: Tensor
    rewards: Tensor
    ended: Tensor
    last: Tensor  # (E,): value of what came after


@dataclass
class Episodes:
    """Those that ended in a rollout."""

    returns: list[float] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)


def act(actor: Actor, observations: Tensor, noise: Array) -> tuple[Array, Tensor, Tensor | None]:
    """Sample from the policy: `argmax(logits + g)` with Gumbel noise `g` has its distribution.

    Args:
        noise: `(N, A)`, on the host, where actions are needed: logits are hardly more to fetch.

    Returns:
        Actions `(N,)`, logits `(N, A)`, values `(N,)` if the actor gives them.
    """
    logits, values = actor(observations)
    actions: Array = (logits.cpu().numpy() + noise).argmax(1)
    return actions, logits, values


def log_probability(logits: Tensor, actions: Tensor) -> Tensor:
    """Of the actions that were taken: `(..., A)`, `(...)` -> `(...)`."""
    return logits.log_softmax(-1).gather(-1, actions[..., None]).squeeze(-1)


@torch.no_grad()
def collect(
    actor: Actor,
    critic: Critic,
    envs: Environments,
    settings: PPO,
    generator: torch.Generator,
    episodes: Episodes,
) -> Rollout:
    """Act for T steps from where `envs` stands.

    An episode that a time limit cut off did not end for the critic: the discounted value of its
    last state joins the reward (Pardo et al. 2018, "Time limits in reinforcement learning").

    Args:
        critic: asked after all steps, for a minibatch at a time, if the actor gives no values.
        generator: of actions, on the device.
    """
    steps, count, device = settings.num_steps, envs.num_envs, generator.device
    assert envs.observations is not None
    seen = torch.from_numpy(envs.observations)
    observations = torch.empty((steps, *seen.shape), dtype=seen.dtype, device=device)
    places: list[Array | None] = [None] * steps  # of what comes next, where it can be kept at once
    if device.type == "cpu":
        places[:-1] = observations.numpy()[1:]
    rewards, ended = np.empty((steps, count)), np.empty((steps, count), np.bool_)
    cut_values = np.zeros((steps, count))
    noise = torch.empty((steps, count, envs.num_actions), device=device)  # of all steps at once
    noise = -noise.exponential_(generator=generator).log_()
    actions = np.empty((steps, count), np.int64)
    logits, values = list[Tensor](), list[Tensor]()  # one stack costs less than a copy a step
    each = zip(observations, noise.cpu().numpy(), places, strict=True)
    for t, (observation, gumbel, place) in enumerate(each):
        if t == 0 or device.type != "cpu":
            observation.copy_(torch.from_numpy(envs.observations))
        actions[t], logit, value = act(actor, observation, gumbel)
        logits.append(logit)
        if value is not None:
            values.append(value)
        _, rewards[t], terminated, truncated, cut = envs.advance(actions[t], place)
        np.logical_or(terminated, truncated, out=ended[t])
        if cut:
            envs.check_final(cut)
            final = torch.from_numpy(np.stack(list(cut.values()))).to(device)
            cut_values[t, list(cut)] = settings.gamma * critic(final).cpu().numpy()
    envs.check(observations)
    returns, lengths = envs.count(rewards, ended)
    episodes.returns += returns
    episodes.lengths += lengths
    last = critic(torch.from_numpy(envs.observations).to(device))
    if not values:
        parts = observations.flatten(0, 1).tensor_split(settings.num_minibatches)
        values = [torch.cat([critic(part) for part in parts])]
    taken, judged = torch.from_numpy(actions).to(device), torch.cat(values).view(steps, count)
    rewards = envs.scaled(rewards, ended) + cut_values
    return Rollout(
        *(observations, taken, log_probability(torch.stack(logits), taken), judged),
        rewards=torch.from_numpy(rewards).float().to(device),
        ended=torch.from_numpy(ended).to(device),
        last=last,
    )


# --- the loop -----------------------------------------------------------------------------------


def make_optimizer(model: nn.Module, settings: PPO) -> torch.optim.Optimizer:
    """Adam with epsilon 1e-5 [37, 3]."""
    return torch.optim.Adam(model.parameters(), lr=settings.lr, eps=1e-5, foreach=True)


def iterations(settings: PPO, num_envs: int) -> int:
    """Whole rollouts in `total_steps`.

    Raises:
        ValueError: there is not one, or its minibatches would be too small.
    """
    batch = settings.num_steps * num_envs
    if batch < 2 * settings.num_minibatches:
        raise ValueError(
            f"ppo.num_minibatches: {settings.num_minibatches} of {batch} samples "
            f"({settings.num_steps} steps x {num_envs} environments); two or more for each"
        )
    if settings.total_steps < batch:
        raise ValueError(
            f"ppo.total_steps: {settings.total_steps} is less than one rollout, {batch} "
            f"({settings.num_steps} steps x {num_envs} environments)"
        )
    return settings.total_steps // batch


def train(
    model: ActorCritic,
    envs: Environments,
    settings: PPO,
    optimizer: torch.optim.Optimizer,
    *,
    id: str = "policy",
    seed: int = 0,
    start_iteration: int = 0,
    topology: Topology | None = None,
) -> Iterator[Iteration]:
    """Train `model` in place from `start_iteration` on, yielding after every rollout learnt from.

    Args:
        model: where its parameters are, the rollout is kept.
        envs: with rewards as they are to be learnt from (`gamma` set to normalise them), and
            restored where `start_iteration` is not 0.
        topology: which of the actor's weights act, by their names in the actor; an epoch is an
            iteration, and a stochastic one draws one mask for rollout and update.

    Raises:
        ValueError: a reward is not finite; see also `iterations`.
        Diverged: a loss is not finite.
    """
    total = iterations(settings, envs.num_envs)
    device = next(model.parameters()).device
    half = (
        torch.autocast(device.type, dtype=torch.bfloat16)
        if settings.precision == "bfloat16"
        else nullcontext()
    )
    if start_iteration == 0:
        envs.reset()
    assert envs.observations is not None, "restore the environments first"
    for iteration in range(start_iteration, total):
        began, episodes = time.perf_counter(), Episodes()
        lr = settings.lr * (1 - iteration / total if settings.anneal_lr else 1)
        for group in optimizer.param_groups:
            group["lr"] = lr
        if topology:
            topology.start_epoch(iteration)
        weights = partial(_weights, topology, iteration, seed, device)
        with torch.no_grad():
            acting = weights()
        generator = torch.Generator(device).manual_seed(derive(seed, "actions", iteration))
        model.eval()  # what acts is not to depend on who acts beside it, nor to draw by itself
        asked = as_asked(model, half, acting)
        rollout = collect(*asked, envs, settings, generator, episodes)
        collected = time.perf_counter()
        advantages, returns = gae(
            *(rollout.rewards, rollout.values, rollout.ended, rollout.last),
            gamma=settings.gamma,
            lam=settings.gae_lambda,
        )
        residual, spread = (returns - rollout.values).var(), returns.var()
        # (T, E, ...) -> (B, ...)
        samples = [
            tensor.flatten(0, 1)
            for tensor in (*rollout[:2], rollout.log_probs, rollout.values, advantages, returns)
        ]
        model.train()
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(derive(seed, "dropout", iteration))  # layers that draw by themselves
            shuffle = torch.Generator().manual_seed(derive(seed, "minibatches", iteration))
            forwards = (_forward(model, half, weights()) for _ in itertools.count())
            one, passes = _learn(model, forwards, optimizer, settings, samples, shuffle, topology)
        numbers = [float(loss) for loss in one]
        if not all(map(math.isfinite, numbers)):
            raise Diverged(f"{id}: a loss is not finite in iteration {iteration + 1}; lower its lr")
        yield Iteration(
            id=id,
            iteration=iteration + 1,
            iterations=total,
            steps=(iteration + 1) * settings.num_steps * envs.num_envs,
            returns=tuple(episodes.returns),
            lengths=tuple(episodes.lengths),
            policy_loss=numbers[0],
            value_loss=numbers[1],
            entropy=numbers[2],
            approx_kl=numbers[3],
            clip_fraction=numbers[4],
            explained_variance=1 - float(residual) / max(float(spread), 1e-12),
            passes=passes,
            lr=lr,
            seconds=time.perf_counter() - began,
            rollout_seconds=collected - began,
        )


def _learn(
    model: ActorCritic,
    forwards: Iterator[Forward],
    optimizer: torch.optim.Optimizer,
    settings: PPO,
    samples: list[Tensor],
    shuffle: torch.Generator,
    topology: Topology | None,
) -> tuple[Losses, int]:
    """Passes over a rollout's samples `(B, ...)`: the last minibatch's losses, and how many passes.

    Args:
        forwards: the network, for each minibatch anew.
    """
    passes = 0
    while True:
        order = torch.randperm(len(samples[0]), generator=shuffle).to(samples[0].device)
        for batch in order.tensor_split(settings.num_minibatches):
            one = _update(model, next(forwards), optimizer, settings, [s[batch] for s in samples])
            if topology:
                topology.after_step()
        passes += 1
        kl = float(one.approx_kl)
        far = settings.target_kl is not None and not kl <= settings.target_kl
        if far or passes == settings.update_epochs:
            return one, passes


def _weights(
    topology: Topology | None, iteration: int, seed: int, device: torch.device
) -> dict[str, Tensor]:
    """Those of the actor's that act masked in this iteration: by one mask in all of it."""
    if topology is None:
        return {}
    generator = torch.Generator(device).manual_seed(derive(seed, "bernoulli", iteration))
    seen = topology.weights(float(iteration), generator) or {}
    return {f"actor.{name}": weight for name, weight in seen.items()}


def as_asked(
    model: ActorCritic, half: AbstractContextManager[Any], weights: Mapping[str, Tensor]
) -> tuple[Actor, Critic]:
    """The network as a rollout asks it, with some of its parameters replaced.

    A critic that shares nothing with the actor is asked once and not at each step: most of what a
    small network costs are its calls.
    """
    forward = _forward(model, half, weights)
    if model.shared:
        return forward, lambda observations: forward(observations)[1]
    of_actor = {name.removeprefix("actor."): weight for name, weight in weights.items()}
    plain = without_modules(model.actor)

    def actor(observations: Tensor) -> tuple[Tensor, None]:
        x = to_input(observations)
        with half:
            logits = functional_call(model.actor, of_actor, (x,)) if of_actor else plain(x)
        return logits.float(), None

    def critic(observations: Tensor) -> Tensor:
        x = to_input(observations)
        with half:
            values: Tensor = model.critic(x).squeeze(1)
        return values.float()

    return actor, critic


def _forward(
    model: nn.Module, half: AbstractContextManager[Any], weights: Mapping[str, Tensor]
) -> Forward:
    """The network with some of its parameters replaced."""

    def forward(observations: Tensor) -> tuple[Tensor, Tensor]:
        with half:
            if weights:
                logits, values = functional_call(model, dict(weights), (observations,))
            else:
                logits, values = model(observations)
        return logits.float(), values.float()

    return forward


def _update(
    model: nn.Module,
    forward: Forward,
    optimizer: torch.optim.Optimizer,
    settings: PPO,
    minibatch: list[Tensor],
) -> Losses:
    """One step of the optimizer."""
    observations, actions, log_probs, old_values, advantages, returns = minibatch
    logits, values = forward(observations)
    one = losses(
        *(logits, values, actions, log_probs, old_values),
        *(normalized(advantages), returns),
        clip=settings.clip_coef,
        clip_value=settings.clip_value if settings.normalize_reward else None,
    )
    loss = one.policy + settings.vf_coef * one.value - settings.ent_coef * one.entropy
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
    optimizer.step()
    return Losses(*(part.detach() for part in one))


# --- exact resume -------------------------------------------------------------------------------


def training_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, envs: Environments
) -> dict[str, Tensor]:
    """Weights, optimizer and environments as one flat dict of tensors."""
    state = supervised.training_state(model, optimizer)
    return state | {f"envs.{name}": tensor for name, tensor in envs.state().items()}


def restore_training_state(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    envs: Environments,
    tensors: Mapping[str, Tensor],
    say: Callable[[str], Any] = lambda line: None,
) -> None:
    """Inverse of `training_state`, in place; `envs` are newly made.

    Args:
        say: called with one line if episodes could not be brought back and began anew.
    """
    supervised.restore_training_state(model, optimizer, tensors)
    envs.restore(
        {k.removeprefix("envs."): v for k, v in tensors.items() if k.startswith("envs.")}, say
    )
