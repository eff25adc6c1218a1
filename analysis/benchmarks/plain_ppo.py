"""PPO as single-file implementations are written: the alternative that ours is timed against.

Gymnasium's vector environments and wrappers, `torch.distributions`, storage filled step by step.
Only for timing: it neither saves nor stops early.
"""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.wrappers.vector import NormalizeReward, RecordEpisodeStatistics
from torch import Tensor, nn
from torch.distributions import Categorical

from ray_subnets.rl.policy_recipes import PPO


class Games(VectorEnv[Any, Any, Any]):  # type: ignore[misc]
    """A ProcGen game as Gymnasium's vector environment; images `(3, 64, 64)`."""

    def __init__(self, game: str, num_envs: int) -> None:
        from procgen import ProcgenGym3Env

        self._env = ProcgenGym3Env(num=num_envs, env_name=game, num_levels=200, start_level=0)
        self.num_envs = num_envs
        self.single_observation_space = gymnasium.spaces.Box(0, 255, (3, 64, 64), np.uint8)
        self.single_action_space = gymnasium.spaces.Discrete(15)
        self.metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}

    def _observe(self) -> tuple[Any, Any, Any]:
        rewards, observations, first = self._env.observe()
        return observations["rgb"].transpose(0, 3, 1, 2), rewards, first

    def reset(self, **options: Any) -> tuple[Any, dict[str, Any]]:
        return self._observe()[0], {}

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        self._env.act(actions)
        observations, rewards, first = self._observe()
        return observations, rewards, first, np.zeros(self.num_envs, np.bool_), {}


def make(id: str, num_envs: int, gamma: float) -> VectorEnv[Any, Any, Any]:
    """Environments with episode statistics and rewards in proportion to the running return."""
    envs: VectorEnv[Any, Any, Any]
    if id.startswith("procgen/"):
        envs = Games(id.removeprefix("procgen/"), num_envs)
    else:
        envs = gymnasium.make_vec(
            id,
            num_envs,
            vectorization_mode="sync",
            vector_kwargs={"autoreset_mode": AutoresetMode.SAME_STEP},
        )
    return NormalizeReward(RecordEpisodeStatistics(envs), gamma=gamma)


def train(
    model: nn.Module, envs: VectorEnv[Any, Any, Any], settings: PPO, device: torch.device
) -> None:
    """`settings.total_steps` of PPO; `model`: observations -> logits `(N, A)`, values `(N,)`."""
    steps, count = settings.num_steps, envs.num_envs
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.lr, eps=1e-5)
    first, _ = envs.reset()
    observation = torch.tensor(first).to(device)
    done = torch.zeros(count, device=device)
    observations = torch.zeros((steps, *observation.shape), dtype=observation.dtype, device=device)
    actions = torch.zeros((steps, count), dtype=torch.int64, device=device)
    log_probs, rewards, dones, values = (
        torch.zeros((steps, count), device=device) for _ in range(4)
    )
    batch = steps * count
    for _ in range(settings.total_steps // batch):
        for t in range(steps):
            observations[t], dones[t] = observation, done
            with torch.no_grad():
                logits, values[t] = model(observation)
                policy = Categorical(logits=logits)
                actions[t] = policy.sample()
                log_probs[t] = policy.log_prob(actions[t])
            seen, reward, terminated, truncated, _ = envs.step(actions[t].cpu().numpy())
            rewards[t] = torch.tensor(reward).to(device)
            observation = torch.tensor(seen).to(device)
            done = torch.tensor(terminated | truncated).float().to(device)
        with torch.no_grad():
            following = model(observation)[1]
            advantages = torch.zeros_like(rewards)
            advantage = torch.zeros(count, device=device)
            goes_on = 1 - done
            for t in reversed(range(steps)):
                delta = rewards[t] + settings.gamma * following * goes_on - values[t]
                advantage = delta + settings.gamma * settings.gae_lambda * goes_on * advantage
                advantages[t] = advantage
                following, goes_on = values[t], 1 - dones[t]
        flat = [observations.flatten(0, 1), actions.flatten(), log_probs.flatten()]
        flat += [values.flatten(), advantages.flatten(), (advantages + values).flatten()]
        for _ in range(settings.update_epochs):
            for index in torch.randperm(batch).chunk(settings.num_minibatches):
                _learn(model, optimizer, settings, [samples[index] for samples in flat])


def _learn(
    model: nn.Module, optimizer: torch.optim.Optimizer, settings: PPO, minibatch: list[Tensor]
) -> None:
    seen, taken, old, old_values, advantages, returns = minibatch
    logits, values = model(seen)
    policy = Categorical(logits=logits)
    log_ratio = policy.log_prob(taken) - old
    ratio = log_ratio.exp()
    with torch.no_grad():  # logged by all of them
        ((ratio - 1) - log_ratio).mean().item()
        ((ratio - 1).abs() > settings.clip_coef).float().mean().item()
    advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    clip = settings.clip_coef
    surrogate = torch.max(-advantages * ratio, -advantages * torch.clamp(ratio, 1 - clip, 1 + clip))
    near = old_values + torch.clamp(values - old_values, -clip, clip)
    value = 0.5 * torch.max((values - returns) ** 2, (near - returns) ** 2).mean()
    loss = surrogate.mean() + settings.vf_coef * value
    loss = loss - settings.ent_coef * policy.entropy().mean()
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
    optimizer.step()
