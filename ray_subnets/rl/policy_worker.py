"""A worker for policies: learns one, tunes children of it, plays and films them.

Its data set is empty: it only says what a policy sees and how many actions there are.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import asdict, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from ray_subnets import acting, models, sparse, spawning
from ray_subnets.checkpoints import RunFolder, WriteFailed
from ray_subnets.data import Data, Preprocess, Split
from ray_subnets.models import actor_critic
from ray_subnets.population import Worker
from ray_subnets.recipes import ChildSpec, Epoch, Job, Note, Result, derive
from ray_subnets.rl import films, policies, ppo
from ray_subnets.rl.envs import Environments
from ray_subnets.rl.policies import Policy
from ray_subnets.rl.policy_jobs import Film, Match, Member, Player, PolicyChild, PolicyFit
from ray_subnets.rl.policy_recipes import PPO, Env, Iteration
from ray_subnets.spawning import METHODS, anneals
from ray_subnets.stored import (
    kept_fractions,
    load_checkpoint,
    load_weights,
    pack_child,
    restore,
    save_checkpoint,
)
from ray_subnets.strangers import raised
from ray_subnets.topology import Topology

ACTOR = "actor."
MOMENTS = "rewards.moments"
"""beside the parent's weights: of the returns that its rewards were divided by"""
EVERY = 10.0  # seconds between checkpoints, at least
LAST = 100  # episodes whose mean return is told
Doing = Generator[Epoch | Note, None, Any]


def blank(env: Env) -> Data:
    """What a policy of `env` sees and does, as a data set without samples.

    Raises:
        ValueError: `env` cannot be played; see `envs.simulator`.
    """
    envs = Environments(replace(env, num_envs=1, processes=0), 0)
    try:
        shape, actions = envs.observation_shape, envs.num_actions
    finally:
        envs.close()
    kind = torch.uint8 if len(shape) == 3 else torch.float32
    none = Split(torch.zeros((0, *shape), dtype=kind), torch.zeros(0, dtype=torch.int64))
    return Data(env.id, none, none, none, actions, Preprocess())


def recent(curve: list[Iteration]) -> float | None:
    """Mean return of the last `LAST` episodes in training; None if none has ended."""
    returns: list[float] = []
    for one in reversed(curve):
        returns = [*one.returns, *returns]
        if len(returns) >= LAST:
            break
    return sum(returns[-LAST:]) / len(returns[-LAST:]) if returns else None


def read_curve(content: bytes) -> list[Iteration]:
    """Inverse of `_written`."""
    names = {field.name for field in fields(Iteration)}
    records = json.loads(content)
    assert all(record.keys() == names for record in records)
    return [
        Iteration(**record | {key: tuple(record[key]) for key in ("returns", "lengths")})
        for record in records
    ]


def _written(curve: list[Iteration]) -> bytes:
    return json.dumps([asdict(one) for one in curve]).encode()


class PolicyWorker(Worker):
    """A `Worker` whose jobs are those of `policy_jobs.py`."""

    def build(self, seed: int) -> actor_critic.ActorCritic:
        """The run's actor and critic."""
        data = self.data
        model = actor_critic.build(
            self.task.model, data.input_shape, data.num_classes, self.task.model_options, seed
        )
        return model.to(self.device)

    def _check_room(self, job: Job) -> None:
        return None  # what it writes is small

    def _run(self, job: Job) -> Doing:
        if isinstance(job, PolicyFit):
            return (yield from self._fit(job))
        assert self.parent, "a child was submitted before its parent was shared"
        if isinstance(job, PolicyChild):
            return (yield from self._tuned(job))
        if isinstance(job, Match):
            return self._match(job)
        assert isinstance(job, Film), job
        return self._film(job)

    # --- learning ---

    def _fit(self, job: PolicyFit) -> Doing:
        model = self.build(job.seed)
        curve, moments = yield from self.learn(job, model, job.env, job.ppo, job.seed)
        tensors = model.state_dict() | ({} if moments is None else {MOMENTS: moments})
        weights = self.folder.save_tensors(f"{job.id}.safetensors", tensors)
        return Result(id=job.id, weights=weights, **self._learnt(job, curve))

    def _tuned(self, job: PolicyChild) -> Doing:
        """As `Worker.make` does it for classifiers."""
        spec = job.spec
        model = self.build(seed=0)
        model.load_state_dict({k: v for k, v in self.parent.items() if k != MOMENTS})
        actor = model.get_submodule("actor")
        body = self.anatomy(actor, spec)
        child = spawning.spawn_weights(_actors(self.parent), body, spec)
        actor.load_state_dict(child.weights)
        tuned = acting.topology(spec, child.subnetwork, body, dict(actor.named_parameters()))
        assert tuned is not None, spec.method
        curve, _ = yield from self.learn(
            *(job, model, job.env, job.ppo, spec.training_seed),
            topology=tuned,
            moments=self.parent.get(MOMENTS),
        )
        masks = {name: mask.cpu() for name, mask in tuned.masks.items()}
        if anneals(spec):
            final = {name: tensor.cpu() for name, tensor in actor.state_dict().items()}
            actor.load_state_dict(sparse.prune(final, masks))
        packed = pack_child(actor, spec, child.subnetwork, masks)
        stored = self.folder.save_tensors(f"children/{spec.id}.safetensors", packed)
        kept = kept_fractions(actor, body, masks if METHODS[spec.method].prunes else {})
        return Result(id=job.id, weights=stored, kept=kept, **self._learnt(job, curve))

    def learn(
        self,
        job: Job,
        model: actor_critic.ActorCritic,
        env: Env,
        settings: PPO,
        seed: int,
        *,
        topology: Topology | None = None,
        moments: Tensor | None = None,
    ) -> Generator[Epoch | Note, None, tuple[list[Iteration], Tensor | None]]:
        """PPO from the job's last checkpoint on.

        Args:
            moments: of the returns by which rewards were divided where the critic learnt: a fresh
                estimate would be of another scale than the critic.

        Returns:
            Every iteration since its start, and the moments now; None if rewards stay as they are.
        """
        gamma = settings.gamma if settings.normalize_reward else None
        envs = Environments(env, derive(seed, "train"), gamma=gamma)
        try:
            optimizer = ppo.make_optimizer(model, settings)
            said: list[str] = []
            curve: list[Iteration] = []

            def go_back(state: Mapping[str, Tensor]) -> None:
                ppo.restore_training_state(model, optimizer, envs, state, said.append)
                curve.extend(read_curve(state["curve"].numpy().tobytes()))

            if moments is not None and envs.normaliser:
                envs.normaliser.moments = moments.numpy()
            start, _, earlier = load_checkpoint(self.folder, job, go_back, said.append, topology)
            for line in said:
                yield self._trouble(job, line)
            if not self._busy:
                self._earlier = max(earlier, self._earlier or 0.0)
            began = kept = time.time()
            lost = False
            self._timings["spawn"] = began - self._started
            for done in ppo.train(
                *(model, envs, settings, optimizer),
                id=job.id,
                seed=seed,
                start_iteration=start,
                topology=topology,
            ):
                self._busy = True
                curve.append(done)
                if time.time() - kept >= EVERY and done.iteration < done.iterations:
                    kept = time.time()
                    state = ppo.training_state(model, optimizer, envs)
                    text = bytearray(_written(curve))
                    state["curve"] = torch.frombuffer(text, dtype=torch.uint8)
                    seconds = (self._earlier or 0.0) + kept - self._started
                    try:
                        save_checkpoint(
                            *(self.folder, job, state, done.iteration, done.steps),
                            *(seconds, topology),
                        )
                    except WriteFailed as error:
                        if not lost:
                            lost = True
                            why = str(error).split(";")[0]
                            yield self._trouble(job, f"no checkpoint: {why}; it goes on without")
                yield _told(job, curve)
            self._timings["train"] = time.time() - began
            scale = envs.normaliser
            return curve, torch.from_numpy(scale.moments) if scale else None
        finally:
            envs.close()

    def _learnt(self, job: Job, curve: list[Iteration]) -> dict[str, Any]:
        """What a result says of a training."""
        mean = recent(curve)
        return {
            "validation": {} if mean is None else {"return": mean},
            "outputs": self.folder.write(f"curves/{job.id}.json", _written(curve)),
            "epochs": job.epochs,
            "images": curve[-1].steps,
        }

    # --- playing ---

    def policy(self, player: Player) -> Policy:
        """Who plays, made from the parent's weights, recipes and files of tuned children."""
        if not player.members:
            return policies.Chance(self.data.num_classes)
        actors = [self._actor(member) for member in player.members]
        return policies.Ensemble(actors, player.combine)

    def _actor(self, member: Member) -> nn.Module:
        shape = self.data.input_shape
        actor = actor_of(self.build_actor, self.folder, self.parent, member, shape)
        return actor.to(self.device)

    def build_actor(self) -> nn.Module:
        data = self.data
        return models.build(
            self.task.model, data.input_shape, data.num_classes, self.task.model_options, seed=0
        )

    def _match(self, job: Match) -> Result:
        arrays, steps = {}, 0
        for player in job.players:
            played = policies.play(
                self.policy(player),
                job.env,
                seed=job.seed,
                how=player.choose,
                device=self.device,
                limit=job.limit,
            )
            steps += int(played.lengths.sum())
            for what in ("returns", "lengths", "levels"):
                arrays[f"{player.name}/{what}"] = getattr(played, what)
        outputs = self.folder.save_arrays(f"outputs/{job.id}.npz", arrays)
        return Result(id=job.id, outputs=outputs, images=steps)

    def _film(self, job: Film) -> Result:
        """A run does without a film that cannot be made."""
        try:
            env = films.seen(job.env)
            content = films.shoot(
                self.policy(job.player),
                env,
                seed=job.seed,
                how=job.player.choose,
                steps=job.steps,
                device=self.device,
            )
        except ValueError as error:
            return Result(id=job.id, error=str(error))
        except (Exception, SystemExit) as error:  # whatever a user's environment raises
            return Result(id=job.id, error=f"evaluate.film: {job.env.id} raised {raised(error)}")
        return Result(id=job.id, outputs=self.folder.write("film.gif", content))


def actor_of(
    build: Callable[[], nn.Module],
    folder: RunFolder,
    parent: Mapping[str, Tensor],
    member: Member,
    input_shape: Sequence[int],
) -> nn.Module:
    """An actor, on the CPU.

    Args:
        build: makes one with any weights.
        parent: weights of actor and critic.

    Raises:
        ValueError: a child's file is damaged or does not belong to its recipe.
    """
    model, weights = build(), _actors(parent)
    if member.spec is None:
        load_weights(model, weights, "parent.safetensors")
        return model
    spec: ChildSpec = member.spec
    return restore(folder, model, weights, spec, member.weights, str(folder), input_shape)


def _actors(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of actor and critic those of the actor, by their names in it."""
    return {k.removeprefix(ACTOR): v for k, v in weights.items() if k.startswith(ACTOR)}


def _told(job: Job, curve: list[Iteration]) -> Epoch:
    """An iteration as progress and TensorBoard know it."""
    last, mean = curve[-1], recent(curve)
    numbers = {
        "entropy": last.entropy,
        "approx_kl": last.approx_kl,
        "clip_fraction": last.clip_fraction,
        "explained_variance": last.explained_variance,
        "value_loss": last.value_loss,
        "steps": float(last.steps),
        "steps_per_second": (last.steps / last.iteration) / last.seconds,
    }
    if mean is not None:
        numbers = {"return": mean, **numbers}
    return Epoch(
        id=job.id,
        epoch=last.iteration,
        epochs=last.iterations,
        loss=last.policy_loss,
        lr=last.lr,
        images=last.steps // last.iteration,
        seconds=last.seconds,
        numbers=numbers,
    )
