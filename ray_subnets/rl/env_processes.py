"""Gymnasium's environments in processes of their own, each with its share: the same numbers.

A process is started once and used again by whoever needs one next; it is a plain Python that
imports neither the calling script nor torch, and ends when the one that started it does. Legend:
E environments.
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import traceback
import warnings
import weakref
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from itertools import pairwise
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from tempfile import NamedTemporaryFile
from typing import Any

import numpy as np

from ray_subnets.rl.simulators import Array, GymnasiumSimulator, Levels, Stepped
from ray_subnets.strangers import raised

_BEGIN = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from ray_subnets.rl.env_processes import serve
serve(int(sys.argv[2]))
"""
_STEP = b"s"  # what a message begins with that is not a pickle: for a few numbers that is slower


def _record(shape: tuple[int, ...], dtype: Any) -> np.dtype[Any]:
    """What comes of a step in one environment, with frames of this shape and dtype."""
    return np.dtype(
        [
            *(("frames", dtype, shape), ("rewards", np.float64), ("levels", np.int64)),
            *(("terminated", np.bool_), ("truncated", np.bool_)),
        ],
        align=True,
    )


@contextmanager
def _shared(count: int, record: np.dtype[Any]) -> Iterator[tuple[str, Array]]:
    """Memory that several processes share, as a path to open it by and the array `(count,)` in it.

    The path is gone at the end, or with this process; the array stays for all that have it.
    """
    size = count * record.itemsize
    with ExitStack() as stack:
        if hasattr(os, "memfd_create"):  # Linux: memory without a file
            descriptor = os.memfd_create("ray_subnets")
            stack.callback(os.close, descriptor)
            os.ftruncate(descriptor, size)
            path = f"/proc/{os.getpid()}/fd/{descriptor}"
        else:
            file = stack.enter_context(NamedTemporaryFile(prefix="ray_subnets-"))
            file.write(bytes(size))  # all of it: no room is to be found out now, and not later
            file.flush()
            path = file.name
        yield path, _mapped(path, record, count)


def _mapped(path: str, record: np.dtype[Any], count: int) -> Array:
    return np.asarray(np.memmap(path, record, "r+", shape=count))


class Process:
    """One that steps environments; `end` ends it, which is done at the latest with our own."""

    def __init__(self) -> None:
        self._connection, theirs = Pipe()
        descriptor = theirs.fileno()
        self._process = subprocess.Popen(
            [sys.executable, "-c", _BEGIN, json.dumps(sys.path), str(descriptor)],
            stdin=subprocess.DEVNULL,
            pass_fds=[descriptor],
        )
        theirs.close()
        self.end = weakref.finalize(self, _end, self._connection, self._process)
        self.waited_for = False

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, what: str, *arguments: Any) -> None:
        """Begin to do `what`, a method of its simulator or "make"; `answer` must follow."""
        self._send(pickle.dumps((what, arguments)))

    def ask_step(self, actions: Array) -> None:
        """One action in each of its environments; `answered` must follow."""
        self._send(_STEP + actions.astype(np.int64).tobytes())

    def _send(self, message: bytes) -> None:
        assert not self.waited_for
        self.waited_for = True
        with suppress(OSError):  # it has ended: `answered` says so
            self._connection.send_bytes(message)

    def answered(self) -> bytes:
        """What came of it, as `serve` sends it.

        Raises:
            ValueError: as it was raised there; or the process has ended.
        """
        try:
            message = self._connection.recv_bytes()
        except (EOFError, OSError):
            code = self._process.wait()
            raise ValueError(
                f"env.processes: a process that steps environments has ended, exit code {code} "
                "(-9: killed, often for want of memory); with 0 they are stepped in this one"
            ) from None
        self.waited_for = False
        if not message.startswith(_STEP):
            _, error = pickle.loads(message)
            if error is not None:
                raise error
        return message

    def answer(self) -> Any:
        """What came of `ask`; raises as `answered`."""
        return pickle.loads(self.answered())[0]


def _end(connection: Connection, process: subprocess.Popen[bytes]) -> None:
    connection.close()
    try:
        process.wait(1)
    except subprocess.TimeoutExpired:  # it does something long
        process.kill()
        process.wait()


_lock = threading.Lock()
_idle: list[Process] = []


def _taken(count: int) -> list[Process]:
    """Processes that nobody else uses."""
    with _lock:
        _idle[:] = [process for process in _idle if process.alive]
        old, _idle[:] = _idle[:count], _idle[count:]
    return old + [Process() for _ in range(count - len(old))]


class ProcessesSimulator:
    """As a `GymnasiumSimulator` of all of them, with the same frames, levels and state.

    What comes of a step is written into memory that all processes share.

    An environment that is registered in the calling process only, in a notebook for example, is
    sent along.

    Args:
        processes: 1 or more, at most one for each environment is used.

    Raises:
        ValueError: see `GymnasiumSimulator`.
    """

    def __init__(
        self,
        id: str,
        num_envs: int,
        levels: Levels,
        seed: int,
        options: Mapping[str, Any],
        *,
        processes: int,
    ) -> None:
        one = GymnasiumSimulator(id, 1, levels, seed, options)  # what is wrong is told from here
        one.close()
        self.frame_shape, self.num_actions = one.frame_shape, one.num_actions
        cuts = np.linspace(0, num_envs, min(processes, num_envs) + 1).round().astype(int).tolist()
        self._parts = [slice(*ends) for ends in pairwise(cuts)]
        self._processes = _taken(len(self._parts))
        try:
            with _shared(num_envs, _record(one.frame_shape, one.dtype)) as (path, self._came):
                settings = (_spec(one), path, num_envs, levels, seed, dict(options))
                self._all("make", [(*settings, part) for part in self._parts])
        except BaseException:
            self.close()
            raise
        self._level = np.zeros(num_envs, np.int64)

    def _all(self, what: str, arguments: list[tuple[Any, ...]] | None = None) -> list[Any]:
        """Do it in all at once: an answer for each part."""
        for k, process in enumerate(self._processes):
            process.ask(what, *(arguments[k] if arguments else ()))
        return [process.answer() for process in self._processes]

    def _read_levels(self) -> None:
        self._level = np.concatenate(self._all("levels"))

    def reset(self) -> Array:
        frames = np.concatenate(self._all("reset"))
        self._read_levels()
        return frames

    def step(self, actions: Array, out: Array | None = None) -> Stepped:
        final: dict[int, Array] = {}
        for part, process in zip(self._parts, self._processes, strict=True):
            process.ask_step(actions[part])
        for part, process in zip(self._parts, self._processes, strict=True):
            if cut := process.answered()[len(_STEP) :]:
                final |= {part.start + i: frame for i, frame in pickle.loads(cut).items()}
        came = self._came
        frames = np.empty_like(came["frames"]) if out is None else out
        frames[:] = came["frames"]
        self._level = came["levels"].copy()
        return Stepped(
            frames,
            rewards=came["rewards"].copy(),
            terminated=came["terminated"].copy(),
            truncated=came["truncated"].copy(),
            final=final,
        )

    def levels(self) -> Array:
        return self._level.copy()

    def pictures(self) -> Array | None:
        parts = self._all("pictures")
        return None if parts[0] is None else np.concatenate(parts)

    def state(self) -> dict[str, Array]:
        parts = self._all("state")
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def restore(self, state: Mapping[str, Array]) -> tuple[Array, list[int]]:
        ends = np.concatenate([[0], np.cumsum(state["length"])])  # of actions, all in a row

        def share(part: slice) -> dict[str, Array]:
            actions = state["actions"][ends[part.start] : ends[part.stop]]
            return {name: array[part] for name, array in state.items()} | {"actions": actions}

        shares = [(share(part),) for part in self._parts]
        frames, lost = zip(*self._all("restore", shares), strict=True)
        self._read_levels()
        return np.concatenate(frames), [
            part.start + i for part, some in zip(self._parts, lost, strict=True) for i in some
        ]

    def close(self) -> None:
        """Give the processes back; one that has not answered is of no more use."""
        for process in self._processes:
            if process.waited_for:
                process.end()
                continue
            try:
                process.ask("close")
                process.answer()
            except Exception:
                process.end()
            else:
                with _lock:
                    _idle.append(process)
        self._processes = []


def _spec(one: GymnasiumSimulator) -> bytes:
    """How its environments are made, also where nobody registered them."""
    import cloudpickle
    import gymnasium

    sent: bytes = cloudpickle.dumps(gymnasium.spec(one.spec_id))
    return sent


# --- in the process -------------------------------------------------------------------------------


class _Share:
    """Some of the environments, and where to write what comes of their steps."""

    def __init__(
        self,
        spec: bytes,
        path: str,
        num_envs: int,
        levels: Levels,
        seed: int,
        options: Mapping[str, Any],
        part: slice,
    ) -> None:
        import cloudpickle
        import gymnasium

        known = cloudpickle.loads(spec)
        gymnasium.registry[known.id] = known
        count = part.stop - part.start
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they were told where it was made first
            self.simulator = GymnasiumSimulator(
                known.id, count, levels, seed, options, first=part.start
            )
        record = _record(self.simulator.frame_shape, self.simulator.dtype)
        self._came = _mapped(path, record, num_envs)[part]

    def step(self, actions: Array) -> dict[int, Array]:
        """The last frames of episodes that were cut off; all else is written."""
        came = self._came
        _, came["rewards"], came["terminated"], came["truncated"], final = self.simulator.step(
            actions, came["frames"]
        )
        came["levels"] = self.simulator.levels()
        return final


def serve(end: int) -> None:
    """Do what is asked through the file descriptor `end`, until the other side closes it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the one that started us
    threading.Thread(target=_follow, args=(os.getppid(),), daemon=True).start()
    with suppress(EOFError, OSError):  # the other side is gone
        _serve(Connection(end))


def _follow(parent: int) -> None:
    """End with the process that started this one, even in the middle of a step."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _serve(connection: Connection) -> None:
    share: _Share | None = None
    while True:
        message = connection.recv_bytes()
        try:
            if message.startswith(_STEP):
                assert share
                final = share.step(np.frombuffer(message, np.int64, -1, len(_STEP)))
                reply = _STEP + (pickle.dumps(final) if final else b"")
            else:
                what, arguments = pickle.loads(message)
                if what == "make":
                    share, answer = _Share(*arguments), None
                else:
                    assert share
                    answer = getattr(share.simulator, what)(*arguments)
                    if what == "close":
                        share = None
                reply = pickle.dumps((answer, None))
        except Exception as error:  # the environment's are told: see `GymnasiumSimulator`
            told = ValueError(str(error) if isinstance(error, ValueError) else raised(error))
            told.add_note(traceback.format_exc())
            reply = pickle.dumps((None, told))
        connection.send_bytes(reply)
