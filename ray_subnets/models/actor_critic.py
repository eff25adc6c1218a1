"""A network that acts and the value that criticises it.

The actor is a plain classifier of actions, so every recipe makes children of it as of any other
network: subnetworks are of the actor, its last layer is the classifier, and the critic is never
masked or perturbed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ray_subnets import models
from ray_subnets.models.impala import Impala


class ActorCritic(nn.Module):
    """Logits of actions and values of states.

    Args:
        actor: observations as floats -> logits `(N, A)`.
        critic: for an `Impala` a layer on its features (they share the convolutions, as on
            ProcGen in Cobbe et al. 2020); else a network of its own from the same observations.
    """

    def __init__(self, actor: nn.Module, critic: nn.Module) -> None:
        super().__init__()
        self.actor = actor
        self.critic = critic

    @property
    def shared(self) -> bool:
        """Do actor and critic have layers in common?"""
        return isinstance(self.actor, Impala)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Observations `(N, *shape)` -> logits `(N, A)`, values `(N,)`."""
        x = to_input(x)
        if isinstance(self.actor, Impala):  # shared
            features = self.actor.features(x)
            return self.actor.classifier(features), self.critic(features).squeeze(1)
        return self.actor(x), self.critic(x).squeeze(1)


def to_input(x: Tensor) -> Tensor:
    """uint8 images `(N, C, H, W)` from 0 to 1; other observations as float32, as they are."""
    return x.float() / 255 if x.dtype == torch.uint8 and x.dim() == 4 else x.float()


def build(
    name: str,
    observation_shape: Sequence[int],
    num_actions: int,
    options: Mapping[str, Any],
    seed: int,
) -> ActorCritic:
    """An actor, by name as `models.build` takes it, and its critic, weights drawn from `seed`.

    Linear layers of ours are orthogonal with gain sqrt(2), the actor's last with 0.01, so that it
    begins with all actions alike, the critic's with 1; biases zero (openai/baselines; Andrychowicz
    et al. 2021, "What matters for on-policy deep actor-critic methods", 3.2). Networks of others
    stay as they are made.

    Raises:
        ValueError: unknown network or option, or one that does not take these observations.
    """
    actor = models.build(name, observation_shape, num_actions, options, seed)
    critic: nn.Module
    if isinstance(actor, Impala):
        critic = nn.Linear(actor.classifier.in_features, 1)
    else:
        try:
            critic = models.build(name, observation_shape, 1, options, seed)
        except ValueError as error:
            raise ValueError(
                f"model: {name!r} makes the critic too, and must give one number where num_classes "
                f"is 1: {str(error).removeprefix('model: ')}"
            ) from None
    if name not in models.MODELS:
        return ActorCritic(actor, critic)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for network, gain in ((actor, 0.01), (critic, 1.0)):
            layers = [layer for layer in network.modules() if isinstance(layer, nn.Linear)]
            for layer in layers:
                last = layer is layers[-1]
                nn.init.orthogonal_(layer.weight, gain if last else 2**0.5)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
    return ActorCritic(actor, critic)
