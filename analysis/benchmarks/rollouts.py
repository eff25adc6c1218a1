"""The rollout loop against stepping the environments and running the policy alone, in one run.

    python -m analysis.benchmarks.rollouts [--env procgen/coinrun] [--num-envs 64] [--processes 2]

The bound is what the two take with nothing between them: steps of the environments with actions
drawn beforehand, and the policy sampling actions for observations at hand; all steps and then all
answers ("alone"), and one of each in turns, as any loop has to, where each finds the processor's
caches as the other left them. The loop does both, and keeps what is needed to learn; at the end of
a rollout it asks the policy once more, for the value of what comes next. All of them keep the
memory that torch frees, as our commands do. With `--processes` Gymnasium's environments are
stepped in so many, alone as in the loop, and the loop is also measured with all in this one.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch

from analysis.benchmarks.rounds import Measure, Ratios, medians
from ray_subnets.memory import keep_freed
from ray_subnets.models import actor_critic
from ray_subnets.rl import ppo
from ray_subnets.rl.envs import Environments
from ray_subnets.rl.policy_recipes import PPO, Env
from ray_subnets.rl.simulators import Simulator

ROUNDS = 7


def network(
    envs: Environments, device: torch.device, channels: Sequence[int]
) -> actor_critic.ActorCritic:
    """IMPALA with these channels for images, else an MLP."""
    image = len(envs.observation_shape) == 3
    name, options = ("impala", {"channels": channels}) if image else ("mlp", {"hidden": [64, 64]})
    model = actor_critic.build(name, envs.observation_shape, envs.num_actions, options, 0)
    return model.to(device)


def simulator_alone(simulator: Simulator, num_envs: int, steps: int) -> Measure:
    """Seconds for `steps` in each environment."""
    rng = np.random.default_rng(0)
    simulator.reset()

    def measure() -> float:
        actions = rng.integers(simulator.num_actions, size=(steps, num_envs))
        began = time.perf_counter()
        for row in actions:
            simulator.step(row)
        return time.perf_counter() - began

    return measure


def policy_alone(
    forward: ppo.Forward, envs: Environments, steps: int, device: torch.device
) -> Measure:
    """Seconds to answer `steps` times, from observations on the host to actions on the host."""
    seen = envs.observations
    assert seen is not None
    noise = torch.zeros((envs.num_envs, envs.num_actions), device=device)

    @torch.no_grad()
    def measure() -> float:
        began = time.perf_counter()
        for _ in range(steps):
            ppo.act(forward, torch.from_numpy(seen).to(device), noise)[0].cpu().numpy()
        return time.perf_counter() - began

    return measure


def in_turns(measures: Sequence[Measure], steps: int) -> Measure:
    """Seconds of one of each, `steps` times."""
    return lambda: sum(measure() for _ in range(steps) for measure in measures)


def loop(
    forward: ppo.Forward, envs: Environments, settings: PPO, device: torch.device
) -> Callable[[], float]:
    generator = torch.Generator(device).manual_seed(0)

    def measure() -> float:
        began = time.perf_counter()
        ppo.collect(forward, envs, settings, generator, ppo.Episodes())
        return time.perf_counter() - began

    return measure


def compare(env: Env, settings: PPO, channels: Sequence[int], table: Ratios) -> None:
    """Measure, say and add to the table."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    envs = Environments(env, 0, gamma=settings.gamma)
    model = network(envs, device, channels)
    envs.reset()

    def forward(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits, values = model(x)
        return logits, values

    def alone(steps: int) -> tuple[Measure, Measure]:
        stepping = simulator_alone(Environments(env, 1).simulator, env.num_envs, steps)
        return stepping, policy_alone(forward, envs, steps, device)

    measures = [
        *alone(settings.num_steps),
        in_turns(alone(1), settings.num_steps),
        loop(forward, envs, settings, device),
    ]
    if env.processes:
        here = Environments(replace(env, processes=0), 0, gamma=settings.gamma)
        here.reset()
        measures.append(loop(forward, here, settings, device))
    steps, answers, turns, whole, *one = medians(*measures, rounds=ROUNDS)
    actions = env.num_envs * settings.num_steps
    print(
        f"{env.id}: {actions / whole:,.0f} steps/s; environments alone {actions / steps:,.0f}, "
        f"policy alone {actions / answers:,.0f}"
    )
    table.add(f"{env.id}: both alone", "the loop", (steps + answers, whole), ">= 0.90")
    table.add(f"{env.id}: both in turns", "the loop", (turns, whole), ">= 0.90")
    for took in one:
        processes = f"its environments in {env.processes} processes"
        table.add(f"{env.id}: the loop", processes, (took, whole), "> 1.00")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--env", nargs="+", default=["CartPole-v1", "Acrobot-v1"])
    parser.add_argument("--num-envs", type=int, default=64)
    parser.add_argument("--steps", type=int, default=128, help="of a rollout (default 128)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default 1)")
    parser.add_argument("--processes", type=int, default=0, help="that step Gymnasium's; 0: none")
    parser.add_argument("--channels", type=int, nargs="+", default=[32, 64, 128], help="of IMPALA")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    keep_freed()
    table = Ratios(f"Rollouts of {arguments.num_envs} environments x {arguments.steps} steps")
    for id in arguments.env:
        env = Env(id=id, num_envs=arguments.num_envs, num_levels=200, processes=arguments.processes)
        compare(env, PPO(num_steps=arguments.steps), arguments.channels, table)
    table.show()


if __name__ == "__main__":
    main()
