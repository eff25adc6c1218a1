"""PPO on classic control, several seeds, and each policy's noisy ensemble beside it.

    python -m analysis.classic_control                    # CartPole and Acrobot, five seeds
    python -m analysis.classic_control --seeds 0 1 --sigma 0.1

Minutes on one core. A task is solved at the mean return that Gymnasium's registry names. Returns
are of the last rollout's policy on 100 levels, one episode each; parent and ensemble play the same
levels with the same random numbers, and differences are paired.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, replace

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from ray_subnets import spawning
from ray_subnets.models import actor_critic
from ray_subnets.recipes import derive
from ray_subnets.rl import policies, ppo
from ray_subnets.rl.envs import Environments
from ray_subnets.rl.policy_recipes import PPO, Env

PLAIN = PPO(
    total_steps=100_000,
    num_steps=128,
    num_minibatches=4,
    update_epochs=8,
    lr=2e-3,
    anneal_lr=True,
    gamma=0.99,
    ent_coef=0.0,
    target_kl=None,
    normalize_reward=False,
)
MODEL = {"hidden": [64, 64], "activation": "tanh"}
LEVELS = 100


@dataclass(frozen=True)
class Task:
    env: Env
    settings: PPO
    solved: float


TASKS = {
    "CartPole-v1": Task(Env(id="CartPole-v1", num_envs=16, frame_stack=1), PLAIN, 475.0),
    "Acrobot-v1": Task(
        Env(id="Acrobot-v1", num_envs=16, frame_stack=1),
        replace(PLAIN, ent_coef=0.01, normalize_reward=True),
        -100.0,
    ),
}


def trained(task: Task, seed: int) -> tuple[actor_critic.ActorCritic, float]:
    """A policy and the seconds its training took."""
    settings, began = task.settings, time.perf_counter()
    envs = Environments(
        task.env, derive(seed, "train"), gamma=settings.gamma if settings.normalize_reward else None
    )
    model = actor_critic.build("mlp", envs.observation_shape, envs.num_actions, MODEL, seed)
    for _ in ppo.train(model, envs, settings, ppo.make_optimizer(model, settings), seed=seed):
        pass
    return model, time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--sigma", type=float, default=0.1, help="of the noise (default 0.1)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    title = (
        f"Mean return on {LEVELS} levels; 8 children, 20 % of weights, sigma {arguments.sigma:g}"
    )
    table = Table(title=title)
    for heading in ("task", "seed", "steps", "s", "parent", "ensemble", "difference", "95 %"):
        table.add_column(heading, justify="left" if heading == "task" else "right")
    for name in arguments.tasks:
        task, means, gains = TASKS[name], list[float](), list[float]()
        test = replace(task.env, num_envs=LEVELS)
        for seed in arguments.seeds:
            model, seconds = trained(task, seed)
            specs = policies.noisy_children(derive(seed, "noise"), sigma=arguments.sigma)
            members = [spawning.spawn(model.actor, spec) for spec in specs]
            both = {
                "parent": policies.Ensemble([model.actor]),
                "ensemble": policies.Ensemble(members),
            }
            played = policies.compare(both, test, seed=derive(seed, "test"), how="argmax")
            parent, ensemble = played["parent"], played["ensemble"]
            gain = policies.paired(ensemble, parent, seed=seed)
            means.append(float(parent.returns.mean()))
            gains.append(gain.mean)
            print(f"{name}, seed {seed}: {means[-1]:.1f} after {seconds:.0f} s", flush=True)
            table.add_row(
                *(name, str(seed), f"{task.settings.total_steps:,}", f"{seconds:.0f}"),
                *(f"{means[-1]:.1f}", f"{ensemble.returns.mean():.1f}"),
                *(f"{gain.mean:+.2f}", f"{gain.low:+.2f} to {gain.high:+.2f}"),
            )
        low, high = policies.interval(np.array(means))
        solved = sum(mean >= task.solved for mean in means)
        table.add_row(
            name, "all", "", "", f"{np.mean(means):.1f}", "", f"{np.mean(gains):+.2f}", ""
        )
        table.add_row("", "", "", "", f"{low:.1f} to {high:.1f}", "", "", "")
        words = f"{solved} of {len(means)} solved"
        table.add_row(f"(>= {task.solved:g})", "", "", "", words, "", "", "", end_section=True)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
