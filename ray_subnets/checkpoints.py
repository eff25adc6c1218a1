"""The run folder: atomic writes, verified reads, no pickle.

config.yaml        the resolved configuration        parent.safetensors
environment.json   versions, command, commit         single.safetensors
results/ID.json    one finished job                  children/ID.safetensors
outputs/ID.npz     its logits: validation, test      checkpoints/ID.safetensors (unfinished)
ensemble.json      who is a member, its recipe       result.json, report.html, events/
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from fnmatch import fnmatch
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
from torch import Tensor

from ray_subnets import storage
from ray_subnets.recipes import Stored

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None  # type: ignore[assignment]

CONFIG = "config.yaml"
ENSEMBLE = "ensemble.json"
CELL = "cell.json"
"""in the folder of a benchmark's cell"""


class WriteFailed(ValueError):
    """A file of the run folder could not be written; the message says which, why, and what then."""


class RunFolder:
    """A folder that belongs to one run: a path, or a URI that pyarrow opens.

    Raises:
        ValueError: everywhere: what storage refuses, in one line.
    """

    def __init__(self, root: str | Path) -> None:
        self._place = storage.place(root)

    def __str__(self) -> str:
        return self._place.path()

    def path(self, name: str) -> str:
        """Where a file is, as a person would write it."""
        return self._place.path(name)

    @property
    def name(self) -> str:
        """The last part of where it is."""
        return str(self).partition("?")[0].rsplit("/", 1)[-1]

    @property
    def root(self) -> Path:
        """The folder itself, for what only works on this machine.

        Raises:
            ValueError: it is not on this machine.
        """
        if not isinstance(self._place, storage.LocalPlace):
            raise ValueError(f"{self}: this needs a folder on this machine; name a path")
        return self._place.root

    @staticmethod
    def check_free(root: str | Path, *, overwrite: bool = False, wanted: str = "run") -> None:
        """May a new run use this folder? Changes nothing.

        Args:
            wanted: what it is for: run, sweep or benchmark; only such a folder is overwritten.

        Raises:
            ValueError: something is there already and `overwrite` is not set, or it is set and
                what is there is not a run folder; or storage does not answer.
        """
        folder = RunFolder(root)
        if folder._state("--out") in ("absent", "empty"):
            return
        if not overwrite:
            raise ValueError(
                f"--out: {root} is already used; choose another --out, add --overwrite, or "
                f"continue it with 'ray-subnets resume {root}'"
            )
        kind = folder._kind()
        if kind != wanted:
            what = f"a {kind}'s folder, not a {wanted}'s" if kind else f"not a {wanted} folder"
            raise ValueError(
                f"--overwrite: {root} is {what}; nothing was deleted. Remove it yourself, or "
                "choose another --out"
            )

    def _kind(self) -> str | None:
        """What this program made here: run, sweep or benchmark; None: nothing that it knows."""
        try:
            settings = self.read(CONFIG).decode()
            if not self.exists("sweep.json") and not self.exists("benchmark.json"):
                assert "ray_subnets" in self.read_json("environment.json")["packages"]
            kinds = {"sweep": "sweep", "rows": "benchmark"}
            found = (kind for key, kind in kinds.items() if re.search(rf"(?m)^{key}:", settings))
            return next(found, "run")
        except (ValueError, KeyError, TypeError, AssertionError, OSError):
            return None

    @staticmethod
    def create(root: str | Path, *, overwrite: bool = False, wanted: str = "run") -> RunFolder:
        """A new, empty run folder.

        Raises:
            ValueError: see `check_free` and `alone`; or the folder cannot be made.
        """
        RunFolder.check_free(root, overwrite=overwrite, wanted=wanted)
        folder = RunFolder(root)
        try:
            if overwrite and folder._place.state() != "absent":
                with folder.alone():
                    folder._place.clear()
            folder._place.make()
        except OSError as error:
            raise ValueError(f"--out: cannot create {root}: {storage.reason(error)}") from None
        return folder

    @staticmethod
    def open(root: str | Path, *, needs: str = CONFIG, saved: bool = False) -> RunFolder:
        """An existing run folder.

        Args:
            saved: a folder with the file `needs` is enough: it may be an ensemble that was saved.

        Raises:
            ValueError: no such folder, or it lacks the file `needs`.
        """
        folder = RunFolder(root)
        if folder._state("RUN") in ("absent", "file"):
            raise ValueError(f"RUN: no such folder: {root}")
        if saved and folder.exists(needs):
            return folder
        if not folder.exists(CONFIG):
            raise ValueError(f"RUN: {root} is not a run folder (no {CONFIG} in it)")
        if folder.exists("sweep.json"):
            raise ValueError(f"RUN: {root} is a sweep; 'ray-subnets sweep {root}' goes on with it")
        if not folder.exists(needs):
            raise ValueError(
                f"RUN: {root} has no {needs}: the run did not finish; "
                f"continue it with 'ray-subnets resume {root}'"
            )
        return folder

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Nobody else works in this folder meanwhile; on this machine, where the system has locks.

        Raises:
            ValueError: somebody does.
        """
        with ExitStack() as stack:
            if fcntl is not None and isinstance(self._place, storage.LocalPlace):
                path = self._place.root / ".lock"
                with suppress(OSError):  # read-only: what is written next says so
                    while True:
                        file = stack.enter_context(path.open("w"))
                        try:
                            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        except BlockingIOError:
                            raise ValueError(
                                f"RUN: another process works in {self}; wait for it, or stop it"
                            ) from None
                        # Whoever had it may have removed it between the two: a lock on nothing.
                        ours = os.fstat(file.fileno())
                        if path.exists() and os.path.samestat(ours, path.stat()):
                            break
                    stack.callback(path.unlink, missing_ok=True)
            yield

    def within(self, name: str) -> RunFolder:
        """A run folder in this one, made if it is not there.

        Raises:
            WriteFailed: it cannot be made.
        """
        inner = RunFolder(storage.join(str(self), name))
        try:
            inner._place.make()
        except OSError as error:
            raise self._unwritable(name, error) from None
        return inner

    def _state(self, who: str) -> storage.State:
        try:
            return self._place.state()
        except OSError as error:
            raise ValueError(f"{who}: cannot look into {self}: {storage.reason(error)}") from None

    def size(self, name: str) -> int | None:
        """Bytes of a file; None if it is not there.

        Raises:
            ValueError: storage does not say.
        """
        try:
            return self._place.size(name)
        except OSError as error:
            raise self._unreadable(name, error) from None

    def exists(self, name: str) -> bool:
        return self.size(name) is not None

    def remove(self, name: str) -> None:
        """Delete a file, if it is there.

        Raises:
            WriteFailed: it cannot be deleted.
        """
        try:
            self._place.delete(name)
        except OSError as error:
            raise self._unwritable(name, error) from None

    # --- bytes ---

    def write(self, name: str, content: bytes, *, lasting: bool = True) -> Stored:
        """Write a file so that readers see the old content or the new, never a part.

        Args:
            lasting: even if the machine loses its power now; see `storage.Place.write`.

        Raises:
            WriteFailed: the disk is full, the folder read-only, the server gone, ...
        """
        try:
            self._place.write(name, content, lasting=lasting)
        except OSError as error:
            raise self._unwritable(name, error) from None
        return Stored(file=name, sha256=hashlib.sha256(content).hexdigest())

    def append(self, name: str, content: bytes) -> bool:
        """Add to a log whose last lines may be lost; False if this storage only writes whole files.

        Raises:
            WriteFailed: see `write`.
        """
        try:
            return self._place.append(name, content)
        except OSError as error:
            raise self._unwritable(name, error) from None

    def _unwritable(self, name: str, error: OSError) -> WriteFailed:
        return WriteFailed(
            f"{self.path(name)}: cannot be written ({storage.reason(error)}); make room or mend "
            f"it, then {self._again('save it again', '{}')}"
        )

    def _unreadable(self, name: str, error: OSError) -> ValueError:
        return ValueError(
            f"{self.path(name)}: cannot be read ({storage.reason(error)}); restore it from a copy, "
            f"or {self._again()}"
        )

    def _again(self, saved: str = "save it again", run: str = "make it again with {}") -> str:
        """How a file comes back: a saved ensemble is no run that could be resumed."""
        try:
            state = self._place.size(CONFIG) is None and self._place.size(ENSEMBLE) is not None
        except OSError:
            state = False
        return saved if state else run.format(f"'ray-subnets resume {self}'")

    @property
    def mend(self) -> str:
        """The same for `ensemble.json`, as the end of a message."""
        return self._again("save the ensemble again", "{} writes it again")

    def read(self, file: str | Stored) -> bytes:
        """The bytes of a file; if `file` says what its hash is, they have that hash.

        Raises:
            ValueError: the file is missing, or its content is not what was written.
        """
        name = file.file if isinstance(file, Stored) else file
        if name.startswith("/") or ".." in name.split("/"):
            raise ValueError(
                f"{self.path('ensemble.json')}: {name!r} points out of the run folder; {self.mend}"
            )
        try:
            content = self._place.read(name)
        except OSError as error:
            raise self._unreadable(name, error) from None
        if isinstance(file, Stored) and hashlib.sha256(content).hexdigest() != file.sha256:
            raise ValueError(
                f"{self.path(name)}: damaged or changed since it was written (SHA-256 differs); "
                f"restore it from a copy, or {self._again()}"
            )
        return content

    # --- JSON ---

    def write_json(self, name: str, value: Any) -> Stored:
        return self.write(name, (json.dumps(value, indent=1) + "\n").encode())

    def read_json(self, name: str) -> Any:
        try:
            return json.loads(self.read(name))
        except json.JSONDecodeError as error:
            raise ValueError(f"{self.path(name)}: not valid JSON ({error})") from None

    # --- tensors ---

    def save_tensors(
        self, name: str, tensors: Mapping[str, Tensor], *, lasting: bool = True
    ) -> Stored:
        """Write tensors of any device as safetensors; those that share memory are written twice.

        `lasting` as for `write`.
        """
        plain: dict[str, Tensor] = {}
        places = set()
        for key, tensor in tensors.items():
            plain[key] = tensor.detach().cpu().contiguous()
            place = plain[key].untyped_storage().data_ptr()
            if place in places and plain[key].numel():
                plain[key] = plain[key].clone()
            places.add(place)
        return self.write(name, safetensors.torch.save(plain), lasting=lasting)

    def load_tensors(self, file: str | Stored) -> dict[str, Tensor]:
        name = file.file if isinstance(file, Stored) else file
        content = self.read(file)
        try:
            return safetensors.torch.load(content)
        except (safetensors.SafetensorError, ValueError) as error:
            raise ValueError(
                f"{self.path(name)}: not an intact safetensors file ({error})"
            ) from None

    # --- arrays ---

    def save_arrays(self, name: str, arrays: Mapping[str, np.ndarray]) -> Stored:
        buffer = BytesIO()
        np.savez(buffer, **arrays)  # type: ignore[arg-type]
        return self.write(name, buffer.getvalue())

    def load_arrays(self, file: str | Stored) -> dict[str, np.ndarray]:
        name = file.file if isinstance(file, Stored) else file
        try:
            with np.load(BytesIO(self.read(file)), allow_pickle=False) as arrays:
                return {key: arrays[key] for key in arrays.files}
        except (zipfile.BadZipFile, KeyError, EOFError) as error:
            raise ValueError(f"{self.path(name)}: not an intact .npz file ({error})") from None


def runs(root: str | Path, pattern: str) -> list[str]:
    """The finished runs in a folder of runs, by name: `runs("s3://bucket/runs", "map-*")`; none if
    there is no such folder.

    Raises:
        ValueError: the folder cannot be read.
    """
    place = storage.place(root)
    try:
        if place.state() == "absent":
            return []
        names = [name for name in place.folders() if fnmatch(name, pattern)]
        return [place.path(name) for name in names if place.size(f"{name}/result.json") is not None]
    except OSError as error:
        raise ValueError(f"{root}: cannot be read ({storage.reason(error)})") from None
