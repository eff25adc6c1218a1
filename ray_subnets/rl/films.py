"""A film of a policy: several environments side by side, as a GIF."""

from __future__ import annotations

import importlib.util
import io
import math
import os
from dataclasses import replace

import numpy as np
import torch
from PIL import Image

from ray_subnets.recipes import derive
from ray_subnets.rl.envs import PROCGEN, Environments
from ray_subnets.rl.policies import Policy, choose
from ray_subnets.rl.policy_jobs import Choice
from ray_subnets.rl.policy_recipes import Env
from ray_subnets.rl.simulators import Array

PANELS = 4  # environments
SIDE = 192  # pixels of a panel's longer side, about
FRAME = 66  # milliseconds that each is shown: ProcGen's own 15 a second
os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")


def seen(env: Env) -> Env:
    """The same with pictures, and so few that they fit side by side.

    Raises:
        ValueError: a package that draws them is not installed.
    """
    env = replace(env, num_envs=PANELS, processes=0)
    if env.id.startswith(PROCGEN):
        return env
    import gymnasium

    made = gymnasium.make(env.id, disable_env_checker=True, **env.options)
    made.close()
    assert made.spec
    kind = str(made.spec.entry_point)
    if "classic_control" in kind and not importlib.util.find_spec("pygame"):
        raise ValueError(
            f"evaluate.film: to draw {env.id} needs the package pygame; install ray_subnets[rl], "
            "or gymnasium[classic-control]"
        )
    modes = made.metadata.get("render_modes", ())
    if "rgb_array" not in modes:
        return env
    return replace(env, options={**env.options, "render_mode": "rgb_array"})


def shoot(
    policy: Policy,
    env: Env,
    *,
    seed: int,
    how: Choice,
    steps: int,
    device: torch.device | str = "cpu",
) -> bytes:
    """A GIF of the first `steps` steps, episode after episode.

    Args:
        env: see `seen`.

    Raises:
        ValueError: there is nothing to see in this environment.
    """
    if not {"DISPLAY", "WAYLAND_DISPLAY", "SDL_VIDEODRIVER"} & os.environ.keys():
        os.environ["SDL_VIDEODRIVER"] = "dummy"  # else SDL complains that there is no screen
    envs = Environments(env, seed)
    try:
        observations, _ = envs.reset()
        rng = np.random.Generator(np.random.SFC64(derive(seed, "choice")))
        frames = []
        for _ in range(steps):
            pictures = envs.simulator.pictures()
            if pictures is None:
                raise ValueError(f"evaluate.film: {env.id} draws no pictures; set it to 0")
            frames.append(_tiled(pictures))
            uniforms = torch.from_numpy(rng.random(envs.num_envs)).to(device)
            probabilities = policy(torch.from_numpy(observations).to(device))
            observations, *_ = envs.step(choose(probabilities, how, uniforms).cpu().numpy())
    finally:
        envs.close()
    buffer = io.BytesIO()
    first, *others = (frame.quantize(64) for frame in frames)
    first.save(
        buffer, "GIF", save_all=True, append_images=others, duration=FRAME, loop=0, optimize=True
    )
    return buffer.getvalue()


def _tiled(pictures: Array) -> Image.Image:
    """`(E, H, W, 3)` -> one picture, the panels in rows."""
    count, height, width, _ = pictures.shape
    scale = SIDE / max(height, width)
    size = (round(width * scale), round(height * scale))
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    gap = 4
    canvas = Image.new(
        "RGB", (columns * (size[0] + gap) - gap, rows * (size[1] + gap) - gap), "white"
    )
    how = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BOX
    for i, picture in enumerate(pictures):
        row, column = divmod(i, columns)
        panel = Image.fromarray(picture).resize(size, how)
        canvas.paste(panel, (column * (size[0] + gap), row * (size[1] + gap)))
    return canvas
