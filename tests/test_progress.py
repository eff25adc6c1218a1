"""What is shown while a run lasts adds up, also when it goes on from checkpoints."""

from __future__ import annotations

import io
import sys
import types

import pytest
from rich.console import Console
from tiny import tiny

from ray_subnets import driver, progress
from ray_subnets.recipes import ChildResult, Epoch, Fit, Result, Status, Training

JOBS = driver.jobs(tiny())
VALIDATION = {"accuracy": 0.9, "nll": 0.3}


def epoch(id: str, number: int, of: int) -> Epoch:
    return Epoch(id=id, epoch=number, epochs=of, loss=1.0, lr=0.1, images=1, seconds=1.0)


def feed(view: progress.View) -> None:
    """A run whose single model goes on at epoch 9 of 10 and whose first child fails."""
    with view:
        for job in JOBS:
            start = 9 if job.id == "single" else 1
            for number in range(start, job.epochs + 1):
                view(epoch(job.id, number, job.epochs))
            failed = job.id == "sparse-000"
            kind = Result if job.id in ("parent", "single") else ChildResult
            view(
                kind(
                    id=job.id,
                    validation={} if failed else VALIDATION,
                    error="the loss is nan" if failed else None,
                )
            )


def test_lines_count_to_the_end() -> None:
    console = Console(file=io.StringIO(), width=200)
    feed(progress.Lines(JOBS, console, every=0.0))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert lines[-1].startswith(f"[{len(JOBS)}/{len(JOBS)} networks, 1 failed, about 0:00:00 left]")
    assert any("single epoch 9/10" in line for line in lines)
    assert any("sparse-000 failed: the loss is nan" in line for line in lines)


def test_the_time_left_is_told_from_what_was_done_since_work_began(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Processes take 50 s to start, an epoch 3 s; 20 units, of which the fifth is done."""
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    console = Console(file=io.StringIO(), width=200)
    jobs = [Fit(id="parent", training=Training(epochs=19), seed=0)]
    view = progress.Lines(jobs, console, every=0.0)
    clock[0] = 47.0
    for number in range(1, 6):
        clock[0] += 3.0
        view(epoch("parent", number, 19))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert lines[0].startswith("[0/1 networks]  parent epoch 1/19"), "nothing to go by yet"
    assert lines[-1].startswith("[0/1 networks, about 0:00:45 left]  parent epoch 5/19")


STATUS = Status(nodes=2, actors=3, starting=1, running=2, retried=4)


def test_lines_say_where_the_work_is_done() -> None:
    console = Console(file=io.StringIO(), width=200)
    view = progress.Lines(JOBS, console, every=0.0)
    view.status(STATUS)
    feed(view)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert lines[-1].startswith(
        f"[{len(JOBS)}/{len(JOBS)} networks, 2 running, 3 actors (+1 starting) on 2 nodes, "
        "1 failed, 4 retried, about 0:00:00 left]"
    )


def test_bars_say_it_below() -> None:
    console = Console(file=io.StringIO(), width=200, force_terminal=True)
    view = progress.Bars(JOBS, console)
    view.status(STATUS)
    feed(view)
    *_, last = view._progress.get_renderables()
    assert str(last) == ("  2 running, 3 actors (+1 starting) on 2 nodes, 1 failed, 4 retried")


def test_bars_fill_to_the_end() -> None:
    console = Console(file=io.StringIO(), width=200, force_terminal=True)
    view = progress.Bars(JOBS, console)
    feed(view)
    overall = view._progress.tasks[0]
    assert overall.completed == overall.total == sum(job.epochs + 1 for job in JOBS)
    # Finished children leave the screen; parent and single model stay.
    assert [task.description.strip() for task in view._progress.tasks] == [
        "run",
        "parent",
        "single",
    ]


@pytest.mark.parametrize(
    ("terminal", "quiet", "kind"),
    [(True, False, "Bars"), (False, False, "Lines"), (True, True, "Silent")],
)
def test_the_view_fits_the_place(terminal: bool, quiet: bool, kind: str) -> None:
    console = Console(file=io.StringIO(), force_terminal=terminal)
    assert type(progress.view(JOBS, console, quiet=quiet)).__name__ == kind


def test_a_notebook_shows_one_text_that_is_renewed() -> None:
    shown: list[str] = []
    console = Console(file=io.StringIO())
    feed(progress.Notebook(JOBS, console, every=0.0, show=shown.append, last=3))
    assert console.file.getvalue() == ""  # type: ignore[attr-defined]
    assert all(len(text.splitlines()) <= 4 for text in shown)
    first, *lines = shown[-1].splitlines()
    total = sum(job.epochs + 1 for job in JOBS)
    assert first == f"run {'█' * 28} {total}/{total}"
    assert lines[-1].startswith(f"[{len(JOBS)}/{len(JOBS)} networks, 1 failed, about 0:00:00 left]")


def test_a_notebooks_cell_is_written_once_and_renewed(monkeypatch: pytest.MonkeyPatch) -> None:
    """By IPython's `display` as its documentation has it: the first call gives a handle."""
    calls: list[tuple[str, str]] = []

    class Handle:
        def update(self, content: dict[str, str], *, raw: bool) -> None:
            assert raw
            calls.append(("update", content["text/plain"].splitlines()[-1]))

    def display(content: dict[str, str], *, raw: bool, display_id: bool) -> Handle:
        assert raw
        assert display_id
        calls.append(("display", content["text/plain"].splitlines()[-1]))
        return Handle()

    module = types.ModuleType("IPython.display")
    monkeypatch.setattr(module, "display", display, raising=False)
    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    view = progress.view(JOBS, Console(file=io.StringIO(), force_jupyter=True))
    view.note("starting")
    view.note("going on")
    assert calls == [("display", "starting"), ("update", "going on")]
