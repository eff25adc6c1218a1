"""The rollout loop against stepping the environments and running the policy alone, in one run.

    python -m analysis.benchmarks.rollouts [--env procgen/coinrun] [--num-envs 64] [--processes 2]

The bound is what the two take with nothing between them: steps of the environments with actions
drawn beforehand, and the network sampling actions for observations at hand and valuing them; all
steps and then all answers ("alone"), and one of each in turns, as any loop has to, where each finds
the processor's caches as the other left them. A critic that is a network of its own our loop asks
once, for all steps: where there is one, a third bound ("in turns, one critic") does so too. The
loop does both, and keeps what is needed to learn; at the end of a rollout it asks once more, for
the value of what comes next. All of them keep the memory that torch frees, as our commands do. With
`--processes` Gymnasium's environments are stepped in so many, alone as in the loop, and the loop is
also measured with all in this one.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from contextlib import nullcontext
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


def policy_alone(actor: ppo.Actor, envs: Environments, steps: int, device: torch.device) -> Measure:
    """Seconds to answer `steps` times, from observations on the host to actions on the host."""
    seen = envs.observations
    assert seen is not None
    noise = np.zeros((envs.num_envs, envs.num_actions), np.float32)

    @torch.no_grad()
    def measure() -> float:
        began = time.perf_counter()
        for _ in range(steps):
            ppo.act(actor, torch.from_numpy(seen).to(device), noise)
        return time.perf_counter() - began

    return measure


def critic_alone(
    critic: ppo.Critic, envs: Environments, settings: PPO, device: torch.device
) -> Measure:
    """Seconds to value all that a rollout sees, a minibatch at a time."""
    assert envs.observations is not None
    seen = torch.from_numpy(envs.observations).to(device)
    batches = seen.repeat(settings.num_steps, 1).tensor_split(settings.num_minibatches)

    @torch.no_grad()
    def measure() -> float:
        began = time.perf_counter()
        for batch in batches:
            critic(batch).cpu()
        return time.perf_counter() - began

    return measure


def in_turns(measures: Sequence[Measure], steps: int) -> Measure:
    """Seconds of one of each, `steps` times."""
    return lambda: sum(measure() for _ in range(steps) for measure in measures)


def loop(
    model: actor_critic.ActorCritic, envs: Environments, settings: PPO, device: torch.device
) -> Measure:
    actor, critic = ppo.as_asked(model, nullcontext(), {})
    generator = torch.Generator(device).manual_seed(0)

    def measure() -> float:
        began = time.perf_counter()
        ppo.collect(actor, critic, envs, settings, generator, ppo.Episodes())
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

    def alone(steps: int, asked: ppo.Actor = forward) -> tuple[Measure, Measure]:
        stepping = simulator_alone(Environments(env, 1).simulator, env.num_envs, steps)
        return stepping, policy_alone(asked, envs, steps, device)

    measures = {
        "environments": alone(settings.num_steps)[0],
        "answers": alone(settings.num_steps)[1],
        "turns": in_turns(alone(1), settings.num_steps),
        "loop": loop(model, envs, settings, device),
    }
    if not model.shared:
        actor, critic = ppo.as_asked(model, nullcontext(), {})
        measures["actor turns"] = in_turns(alone(1, actor), settings.num_steps)
        measures["critic"] = critic_alone(critic, envs, settings, device)
    if env.processes:
        here = Environments(replace(env, processes=0), 0, gamma=settings.gamma)
        here.reset()
        measures["one process"] = loop(model, here, settings, device)
    took = dict(zip(measures, medians(*measures.values(), rounds=ROUNDS), strict=True))
    steps, answers, whole = took["environments"], took["answers"], took["loop"]
    actions = env.num_envs * settings.num_steps
    print(
        f"{env.id}: {actions / whole:,.0f} steps/s; environments alone {actions / steps:,.0f}, "
        f"policy alone {actions / answers:,.0f}"
    )
    table.add(f"{env.id}: both alone", "the loop", (steps + answers, whole), ">= 0.90")
    table.add(f"{env.id}: both in turns", "the loop", (took["turns"], whole), ">= 0.90")
    if not model.shared:
        both = took["actor turns"] + took["critic"]
        table.add(f"{env.id}: in turns, one critic", "the loop", (both, whole), ">= 0.90")
    if env.processes:
        processes = f"its environments in {env.processes} processes"
        table.add(f"{env.id}: the loop", processes, (took["one process"], whole), "> 1.00")


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
        env = Env(
            id=id,
            num_envs=arguments.num_envs,
            num_levels=200,
            frame_stack=2 if id.startswith("procgen/") else 1,  # as in our configs
            processes=arguments.processes,
        )
        compare(env, PPO(num_steps=arguments.steps), arguments.channels, table)
    table.show()


if __name__ == "__main__":
    main()
