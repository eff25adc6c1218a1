"""The policy that a run keeps: the parent, or an ensemble of its children."""

from __future__ import annotations

from functools import partial

import torch

from ray_subnets import models
from ray_subnets.checkpoints import RunFolder
from ray_subnets.recipes import Stored
from ray_subnets.rl import policy_run
from ray_subnets.rl.policies import Ensemble
from ray_subnets.rl.policy_jobs import Combine, Member
from ray_subnets.rl.policy_worker import actor_of


def load_policy(
    run: str,
    group: str | None = None,
    *,
    combine: Combine = "probabilities",
    device: torch.device | str = "cpu",
) -> Ensemble:
    """A finished run's policy: observations `(N, *shape)` -> probabilities of actions `(N, A)`.

    Observations are as in training: the newest frames stacked, the newest last, images with their
    channels first, numbers one-hot. Action k is the environment's `start + k`.

    Args:
        group: children that choose together, by their name or method; `parent`: the parent alone;
            default: the first group.

    Raises:
        ValueError: no such run or group, or a file of it is damaged.
    """
    folder = RunFolder.open(run, needs="result.json")
    config, record = policy_run.config_of(folder), folder.read_json("result.json")
    shape, actions = record["env"]["observation_shape"], record["env"]["num_actions"]
    how = (config.model.name, shape, actions, config.model.options)
    build = partial(models.build, *how, seed=0, from_folder=True)
    home = RunFolder(record["parent"]["folder"] or str(folder))
    parent = home.load_tensors(Stored(**record["parent"]["weights"]))
    if group == "parent":
        members = [Member()]
    else:
        labels = list(dict.fromkeys(spec.label for spec in config.specs()))
        if group is not None and group not in labels:
            raise ValueError(f"group: {run} has no {group!r}; it has parent, {', '.join(labels)}")
        tuned = {child["id"]: child["tuned"] for child in record["children"]}
        members = [
            Member(spec=spec, weights=Stored(**tuned[spec.id]["weights"]) if spec.epochs else None)
            for spec in config.specs()
            if spec.label == (group or labels[0])
            and not (tuned[spec.id] and tuned[spec.id]["error"])
        ]
    actors = [actor_of(build, folder, parent, member, shape).to(device) for member in members]
    return Ensemble(actors, combine, shape)
