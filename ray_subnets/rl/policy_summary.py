"""From played episodes to a policy's `result.json`: means, differences in pairs, cost."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ray_subnets.checkpoints import RunFolder
from ray_subnets.recipes import ChildSpec, Result, Stored
from ray_subnets.rl.envs import reward_range
from ray_subnets.rl.policies import Played, paired, sure
from ray_subnets.rl.policy_jobs import Match, Player
from ray_subnets.rl.policy_recipes import Env
from ray_subnets.summary import busy_seconds

PARENT, RANDOM = "parent", "random"
WORDS = {"probabilities": "mean", "logits": "mean logits", "vote": "vote"}
"""how members' answers become one, as tables call it"""


@dataclass(frozen=True)
class Line:
    """A player and its episodes on one set of levels."""

    player: Player
    played: Played
    file: Stored | None = None
    """where they are kept"""


def load_lines(
    folder: RunFolder, matches: Sequence[Match], results: Mapping[str, Result]
) -> list[Line]:
    """What was played in `matches`, in their order.

    Raises:
        ValueError: a file is missing or damaged.
    """
    lines = []
    for match in matches:
        outputs = results[match.id].outputs
        assert isinstance(outputs, Stored), match.id
        arrays = folder.load_arrays(outputs)
        for player in match.players:
            parts = [arrays[f"{player.name}/{what}"] for what in ("returns", "lengths", "levels")]
            lines.append(Line(player, Played(*parts), outputs))
    return lines


def mean_child(lines: Sequence[Line], group: str) -> Line | None:
    """The mean child of a group: on each level the mean of their returns."""
    played = [
        one.played for one in lines if (one.player.kind, one.player.group) == ("child", group)
    ]
    if not played:
        return None
    returns = np.stack([one.returns for one in played]).mean(0)
    lengths = np.stack([one.lengths.astype(np.float64) for one in played]).mean(0)
    choose = lines[0].player.choose
    player = Player(name=f"{group} child", kind="child", choose=choose, group=group)
    return Line(player, Played(returns, lengths, played[0].levels))


def described(lines: Sequence[Line], env: Env, seed: int) -> list[dict[str, Any]]:
    """A record of each player: its mean return, how sure that is, and against the parent.

    Args:
        lines: of one set of levels and one way to choose; the parent is among them.
        seed: of the bootstrap.
    """
    parent = next(one.played for one in lines if one.player.kind == PARENT)
    scale = reward_range(env)
    rows = []
    for line in lines:
        player, played = line.player, line.played
        mean = float(played.returns.mean())
        low, high = sure(played.returns.reshape(-1), played.levels.reshape(-1), seed=seed)
        rows.append(
            {
                "name": player.name,
                "kind": player.kind,
                "group": player.group,
                "combine": player.combine if player.kind == "ensemble" else None,
                "members": len(player.members),
                "episodes": played.returns.size,
                "mean": mean,
                "low": low,
                "high": high,
                "normalised": _scaled([mean, low, high], scale) if scale else None,
                "file": asdict(line.file) if line.file else None,
                "length": float(played.lengths.mean()),
                "difference": None
                if player.kind == PARENT
                else asdict(paired(played, parent, seed=seed)),
            }
        )
    return rows


def _scaled(values: Sequence[float], scale: tuple[float, float]) -> dict[str, float]:
    """As fractions of what can be had; see `procgen_games.RANGES`."""
    low, high = scale
    names = ("mean", "low", "high")
    return {name: (value - low) / (high - low) for name, value in zip(names, values, strict=True)}


def evaluation(
    lines: Mapping[tuple[str, str], Sequence[Line]], levels: Mapping[str, Env], seed: int
) -> list[dict[str, Any]]:
    """`evaluation` of `result.json`: an entry for each set of levels and each way to choose.

    Args:
        lines: by these two.
    """
    found = []
    for (name, choose), some in lines.items():
        groups = dict.fromkeys(one.player.group for one in some if one.player.kind == "child")
        means = [mean_child(some, group) for group in groups]
        rows = [*some, *(one for one in means if one is not None)]
        found.append(
            {"levels": name, "choose": choose, "players": described(rows, levels[name], seed)}
        )
    return found


def training(result: Result, start: float) -> dict[str, Any]:
    """What became of a policy that was trained or tuned.

    Args:
        start: of the run, Unix time.
    """
    return {
        "rollouts": result.epochs,
        "steps": result.images,
        "return": result.validation.get("return"),
        "curve": asdict(result.outputs) if result.outputs else None,
        "weights": asdict(result.weights) if result.weights else None,
        "worker": result.worker,
        "node": result.node,
        "start": result.started - start,
        "seconds": result.seconds,
        "attempts": result.attempts,
        "error": result.error,
        "troubles": list(result.troubles),
    }


def playing(
    matches: Sequence[Match], results: Mapping[str, Result], start: float
) -> list[dict[str, Any]]:
    """Who played whom where, and when."""
    return [
        {
            "id": match.id,
            "players": [player.name for player in match.players],
            "worker": results[match.id].worker,
            "node": results[match.id].node,
            "start": results[match.id].started - start,
            "seconds": results[match.id].seconds,
            "steps": results[match.id].images,
            "attempts": results[match.id].attempts,
        }
        for match in matches
    ]


def children(
    specs: Iterable[ChildSpec], results: Mapping[str, Result], start: float
) -> list[dict[str, Any]]:
    """Of each child its recipe, and if it was tuned how that went."""
    return [
        {
            "id": spec.id,
            "method": spec.method,
            "group": spec.label,
            "recipe": spec.to_json(),
            "tuned": training(results[spec.id], start) if spec.id in results else None,
        }
        for spec in specs
    ]


def cost(
    folder: RunFolder, results: Mapping[str, Result], matches: Sequence[Match], parameters: int
) -> dict[str, Any]:
    """What was spent, in steps of the environments and seconds."""
    played = {match.id for match in matches}
    files = [result.weights.file for result in results.values() if result.weights]
    return {
        "parent_steps": results["parent"].images,
        "tuning_steps": sum(
            result.images for id, result in results.items() if id not in played and id != "parent"
        ),
        "playing_steps": sum(results[id].images for id in played),
        "wall_seconds": busy_seconds(results.values()),
        "device_seconds": sum(result.device_seconds for result in results.values()),
        "parameters": parameters,
        "bytes_on_disk": sum(folder.size(name) or 0 for name in files),
    }
