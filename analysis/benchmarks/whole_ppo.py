"""All of PPO, rollouts and updates, against a plain single-file implementation, in one run.

    python -m analysis.benchmarks.whole_ppo [--env CartPole-v1 procgen/coinrun] [--num-envs 64]

Both train the same network with the same settings and no early stopping, so both do the same
passes. Each has a process, for ours keeps the memory that torch frees (`ray_subnets.memory`, see
`kept_memory`), which nobody's single file does; a second row has a plain one that does it too. What
bounds them is printed as well: the seconds that the environments, the policy's answers, and
forward, backward and optimizer step of the minibatches take by themselves, with nothing between
them, in ours.
"""

from __future__ import annotations

import argparse
import time
from functools import partial

import torch

from analysis.benchmarks import plain_ppo
from analysis.benchmarks.rollouts import network, policy_alone, simulator_alone
from analysis.benchmarks.rounds import Measure, Ratios, apart, medians
from ray_subnets.memory import keep_freed
from ray_subnets.rl import ppo
from ray_subnets.rl.envs import Environments
from ray_subnets.rl.policy_recipes import PPO, Env

CHANNELS = (8, 16, 16)  # of IMPALA: a network that two cores can train


def ours(env: Env, settings: PPO, device: torch.device) -> Measure:
    keep_freed()  # as our commands do

    def measure() -> float:
        envs = Environments(env, 0, gamma=settings.gamma)
        model = network(envs, device, CHANNELS)
        optimizer = ppo.make_optimizer(model, settings)
        began = time.perf_counter()
        for _ in ppo.train(model, envs, settings, optimizer):
            pass
        took = time.perf_counter() - began
        envs.close()
        return took

    return measure


def plain(env: Env, settings: PPO, device: torch.device, keep: bool) -> Measure:
    if keep:
        keep_freed()

    def measure() -> float:
        model = network(Environments(env, 0), device, CHANNELS)
        envs = plain_ppo.make(env.id, env.num_envs, settings.gamma)
        began = time.perf_counter()
        plain_ppo.train(model, envs, settings, device)
        took = time.perf_counter() - began
        envs.close()
        return took

    return measure


def learning_alone(env: Env, settings: PPO, device: torch.device) -> Measure:
    """Seconds of the minibatches of one rollout, all of the same samples."""
    envs = Environments(env, 0)
    model = network(envs, device, CHANNELS)
    optimizer = ppo.make_optimizer(model, settings)
    size = settings.num_steps * env.num_envs // settings.num_minibatches
    first, _ = envs.reset()
    seen = torch.from_numpy(first).to(device)
    seen = seen.repeat(-(-size // len(seen)), *[1] * (seen.ndim - 1))[:size]

    def measure() -> float:
        began = time.perf_counter()
        for _ in range(settings.update_epochs * settings.num_minibatches):
            logits, values = model(seen)
            optimizer.zero_grad(set_to_none=True)
            (logits.square().mean() + values.square().mean()).backward()
            optimizer.step()
        return time.perf_counter() - began

    return measure


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--env", nargs="+", default=["CartPole-v1", "Acrobot-v1"])
    parser.add_argument("--num-envs", type=int, default=64)
    parser.add_argument("--steps", type=int, default=128, help="of a rollout (default 128)")
    parser.add_argument("--iterations", type=int, default=2, help="of a training (default 2)")
    parser.add_argument("--rounds", type=int, default=3, help="median of so many (default 3)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default 1)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    keep_freed()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch = arguments.num_envs * arguments.steps
    settings = PPO(
        total_steps=batch * arguments.iterations, num_steps=arguments.steps, target_kl=None
    )
    table = Ratios(
        f"PPO, {arguments.iterations} rollouts of {arguments.num_envs} x {arguments.steps}"
    )
    for id in arguments.env:
        levels = 200 if id.startswith("procgen/") else 0
        env = Env(id=id, num_envs=arguments.num_envs, num_levels=levels, frame_stack=1)
        envs = Environments(env, 0)
        envs.reset()
        mine, theirs, keeping, stepping, answering, learning = medians(
            apart(partial(ours, env, settings, device)),
            apart(partial(plain, env, settings, device, False)),
            apart(partial(plain, env, settings, device, True)),
            simulator_alone(Environments(env, 1).simulator, env.num_envs, arguments.steps),
            policy_alone(network(envs, device, CHANNELS), envs, arguments.steps, device),
            learning_alone(env, settings, device),
            rounds=arguments.rounds,
        )
        parts = {"environments": stepping, "answers": answering, "minibatches": learning}
        share = ", ".join(
            f"{name} {100 * seconds * arguments.iterations / mine:.0f} %"
            for name, seconds in parts.items()
        )
        print(
            f"{id}: {settings.total_steps / mine:,.0f} steps/s, plain "
            f"{settings.total_steps / theirs:,.0f}; of our time, alone: {share}"
        )
        table.add(f"{id}: ours", "plain single-file PPO", (mine, theirs), "< 1.00")
        table.add(f"{id}: ours", "the same, memory kept", (mine, keeping), "< 1.00")
    table.show()


if __name__ == "__main__":
    main()
