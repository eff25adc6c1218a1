"""What a person sees while a run lasts."""

from __future__ import annotations

import importlib
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from types import TracebackType
from typing import Any, Protocol, Self

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from ray_subnets.population import Report
from ray_subnets.recipes import Epoch, Job, Note, Result, SolveResult, Status


class View(Protocol):
    """Shows reports as they come; a context manager."""

    def __call__(self, report: Report) -> None: ...

    def note(self, line: str) -> None:
        """Show a line that is not a report."""

    def status(self, status: Status) -> None:
        """Show where the work is done."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


def _total(jobs: Sequence[Job]) -> int:
    # One unit per epoch and one per finished job, so that untrained children count too.
    return sum(job.epochs + 1 for job in jobs)


def _where(status: Status | None, failed: int) -> list[str]:
    """Actors and nodes, and what went wrong, as parts of a sentence."""
    parts = []
    if status:
        parts.append(f"{status.running} running")
        waiting = f" (+{status.starting} starting)" if status.starting else ""
        parts.append(f"{_count(status.actors, 'actor')}{waiting} on {_count(status.nodes, 'node')}")
    if failed:
        parts.append(f"{failed} failed")
    if status and status.retried:
        parts.append(f"{status.retried} retried")
    return parts


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


class _Progress(Progress):
    """Bars with one line of text below."""

    line = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        if self.line:
            yield Text(self.line, style="dim", no_wrap=True, overflow="ellipsis")


class Bars:
    """Live bars: the run as a whole, parent and single model, and each child being tuned."""

    def __init__(self, jobs: Sequence[Job], console: Console) -> None:
        self._progress = _Progress(
            TextColumn("{task.description}", justify="left"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[say]}"),
            console=console,
            transient=False,
        )
        self._units = {job.id: job.epochs for job in jobs}
        self._all = self._progress.add_task("run", total=_total(jobs), say="")
        self._rows: dict[str, TaskID] = {}
        self._done = self._failed = 0
        self._jobs = len(jobs)
        self._status: Status | None = None

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def note(self, line: str) -> None:
        self._progress.console.print(line, highlight=False)

    def status(self, status: Status) -> None:
        self._status = status
        self._line()

    def _line(self) -> None:
        self._progress.line = "  " + ", ".join(_where(self._status, self._failed))

    def __call__(self, report: Report) -> None:
        if isinstance(report, Note):
            self.note(report.line)
            return
        if isinstance(report, Epoch):
            row = self._rows.get(report.id)
            if row is None:
                row = self._progress.add_task(f"  {report.id}", total=report.epochs, say="")
                self._rows[report.id] = row
            # A job that goes on from a checkpoint jumps over epochs not seen here.
            before = int(self._progress.tasks[self._progress.task_ids.index(row)].completed)
            self._progress.update(
                row, completed=report.epoch, say=f"{_learnt(report)} lr {report.lr:.1e}"
            )
            self._progress.advance(self._all, report.epoch - before)
            return
        self._done += 1
        self._failed += report.error is not None
        self._line()
        self._progress.update(self._all, say=f"{self._done} of {self._jobs} networks done")
        row = self._rows.pop(report.id, None)
        seen = 0
        if row is not None:
            seen = int(self._progress.tasks[self._progress.task_ids.index(row)].completed)
        self._progress.advance(self._all, self._units[report.id] - seen + 1)
        if row is not None and report.id not in ("parent", "single"):
            self._progress.remove_task(row)
        elif row is not None:
            self._progress.update(row, say=_outcome(report))
        if report.error:
            self.note(f"{report.id}: {report.error}")


class Lines:
    """The same for a log file or a pipe: a line now and then, with the time left."""

    def __init__(self, jobs: Sequence[Job], console: Console, every: float = 5.0) -> None:
        self._console, self._every = console, every
        self._total, self._units = _total(jobs), {job.id: job.epochs for job in jobs}
        self._jobs, self._done, self._failed = len(jobs), 0, 0
        self._status: Status | None = None
        self._completed, self._seen = 0, dict.fromkeys(self._units, 0)
        self._fresh = 0  # units done since the start; others were found done
        self._first = 0.0  # when the first of them was: before it processes started
        self._last, self._start = time.monotonic(), time.time()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        return None

    def note(self, line: str) -> None:
        self._console.print(line, highlight=False, soft_wrap=True)

    def status(self, status: Status) -> None:
        self._status = status

    def __call__(self, report: Report) -> None:
        if isinstance(report, Note):
            self.note(report.line)
            return
        if isinstance(report, Epoch):
            self._completed += report.epoch - self._seen[report.id]
            self._seen[report.id] = report.epoch
            self._count_fresh(1)
            if time.monotonic() - self._last >= self._every:
                self._last = time.monotonic()
                self.note(
                    f"{self._left()}  {report.id} epoch {report.epoch}/{report.epochs} "
                    f"{_learnt(report)}"
                )
            return
        self._done += 1
        self._failed += report.error is not None
        self._completed += self._units[report.id] - self._seen[report.id] + 1
        self._count_fresh(report.started >= self._start)
        self.note(f"{self._left()}  {report.id} {_outcome(report)}")

    def _count_fresh(self, units: int) -> None:
        if units and not self._fresh:
            self._first = time.monotonic()
        self._fresh += units

    def _left(self) -> str:
        parts = [f"{self._done}/{self._jobs} networks", *_where(self._status, self._failed)]
        units = self._total - self._completed
        if self._fresh > 1 or not units:
            each = (time.monotonic() - self._first) / max(self._fresh - 1, 1)
            parts.append(f"about {timedelta(seconds=round(units * each))} left")
        return f"[{', '.join(parts)}]"


class Notebook(Lines):
    """The same in a notebook's cell: a bar and the last lines, in place of what was there before.

    Args:
        show: puts a text where it was put before; default IPython's own display.
        last: lines that stay to be seen.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        console: Console,
        every: float = 1.0,
        *,
        show: Callable[[str], None] | None = None,
        last: int = 8,
    ) -> None:
        super().__init__(jobs, console, every)
        self._show = show or _cell()
        self._lines: deque[str] = deque(maxlen=last)

    def note(self, line: str) -> None:
        self._lines.append(line)
        done = round(28 * self._completed / max(self._total, 1))
        bar = f"run {'█' * done}{'░' * (28 - done)} {self._completed}/{self._total}"
        self._show("\n".join([bar, *self._lines]))


def _cell() -> Callable[[str], None]:
    """Writes into the output of the notebook's cell that runs."""
    display = importlib.import_module("IPython.display")
    handle: list[Any] = []

    def show(text: str) -> None:
        content = {"text/plain": text}
        if handle:
            handle[0].update(content, raw=True)
        else:
            handle.append(display.display(content, raw=True, display_id=True))

    return show


class Silent:
    """Nothing."""

    def __call__(self, report: Report) -> None:
        return None

    def note(self, line: str) -> None:
        return None

    def status(self, status: Status) -> None:
        return None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        return None


def _learnt(report: Epoch) -> str:
    """How good it is so far; a policy's loss would not say."""
    if "return" in report.numbers:
        return f"return {report.numbers['return']:.2f}"
    return f"loss {report.loss:.3f}"


def _outcome(result: Result) -> str:
    if result.error:
        return f"failed: {result.error}"
    if isinstance(result, SolveResult):
        return f"done in {result.seconds:.1f} s: KL {result.divergence['kl']:.4g} nats"
    value = result.validation
    if "rmse" in value:
        likely = f", NLL {value['nll']:.4f}" if "nll" in value else ""
        return f"done in {result.seconds:.1f} s: validation RMSE {value['rmse']:.4g}{likely}"
    if "accuracy" not in value:
        return f"done in {result.seconds:.1f} s"
    return (
        f"done in {result.seconds:.1f} s: validation accuracy {value['accuracy']:.4f}, "
        f"NLL {value['nll']:.4f}"
    )


def view(jobs: Sequence[Job], console: Console, *, quiet: bool = False) -> View:
    """Bars on a terminal, a text that is renewed in a notebook, lines elsewhere; nothing if
    `quiet`."""
    if quiet:
        return Silent()
    if console.is_jupyter:
        return Notebook(jobs, console)
    return Bars(jobs, console) if console.is_terminal else Lines(jobs, console)
