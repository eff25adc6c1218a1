"""A cell of a policies' sweep: a run in a folder of its own, its parent in another."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator
from dataclasses import replace
from typing import Any

from ray_subnets.pools import SerialPool
from ray_subnets.population import Report
from ray_subnets.recipes import Epoch, Job, Note, Result
from ray_subnets.rl import policy_run
from ray_subnets.rl.policy_jobs import PolicyCell
from ray_subnets.rl.policy_worker import PolicyWorker
from ray_subnets.rl.policyfile import PolicyConfig


class PolicyCellWorker(PolicyWorker):
    """A `PolicyWorker` that does whole cells."""

    def _run(self, job: Job) -> Generator[Epoch | Note, None, Any]:
        if not isinstance(job, PolicyCell):
            return (yield from super()._run(job))
        config = PolicyConfig.model_validate_json(json.dumps(job.settings), strict=True)
        data = policy_run.check(config)
        home = self.folder.within(job.parent)
        where = home if job.alone else self.folder.within(f"cells/{job.id}")
        policy_run.prepare(config, where)
        task = replace(config.task(str(where)), import_from=self.task.import_from)
        worker = PolicyWorker(task, data, str(self.device), self.node)
        if job.alone:
            result = None
            for report in worker.run(config.parent_job()):
                if isinstance(report, Result):
                    result = report
                else:
                    yield replace(report, id=job.id)
            assert result is not None
            return Result(
                id=job.id, validation=result.validation, epochs=result.epochs, images=result.images
            )
        record = policy_run.run(config, data, where, SerialPool(worker), parent=home)
        return Result(id=job.id, images=record["cost"]["playing_steps"])

    def run(self, job: Job, attempt: int = 1) -> Iterator[Report]:
        """A cell that fails is a result with an error: the others go on."""
        try:
            yield from super().run(job, attempt)
        except ValueError as error:
            line = " ".join(str(error).split())[:300]
            yield self._signed(Result(id=job.id, error=line), attempt)
