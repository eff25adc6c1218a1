"""The run folder on disk: atomic writes, verified reads, no pickle.

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
import shutil
import tempfile
import zipfile
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
from torch import Tensor

from ray_subnets.recipes import Stored

CONFIG = "config.yaml"


class RunFolder:
    """A folder that belongs to one run."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root).absolute()

    def __str__(self) -> str:
        return str(self.root)

    @staticmethod
    def check_free(root: str | Path, *, overwrite: bool = False) -> None:
        """May a new run use this folder? Changes nothing.

        Raises:
            ValueError: something is there already and `overwrite` is not set, or it is set and
                what is there is not a run folder.
        """
        path = Path(root)
        if not path.exists() or (path.is_dir() and not any(path.iterdir())):
            return
        if not overwrite:
            raise ValueError(
                f"--out: {root} is already used; choose another --out, add --overwrite, or "
                f"continue it with 'ray-subnets resume {root}'"
            )
        if not (path / CONFIG).is_file():
            raise ValueError(
                f"--overwrite: {root} is not a run folder (no {CONFIG}); nothing was deleted"
            )

    @staticmethod
    def create(root: str | Path, *, overwrite: bool = False) -> RunFolder:
        """A new, empty run folder.

        Raises:
            ValueError: see `check_free`; or the folder cannot be made.
        """
        RunFolder.check_free(root, overwrite=overwrite)
        folder = RunFolder(root)
        if overwrite and folder.root.exists():
            shutil.rmtree(folder.root)
        try:
            folder.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"--out: cannot create {root}: {error.strerror}") from None
        return folder

    @staticmethod
    def open(root: str | Path, *, needs: str = CONFIG) -> RunFolder:
        """An existing run folder.

        Raises:
            ValueError: no such folder, or it lacks the file `needs`.
        """
        folder = RunFolder(root)
        if not folder.root.is_dir():
            raise ValueError(f"RUN: no such folder: {root}")
        if not (folder.root / CONFIG).is_file():
            raise ValueError(f"RUN: {root} is not a run folder (no {CONFIG} in it)")
        if not (folder.root / needs).is_file():
            raise ValueError(
                f"RUN: {root} has no {needs}: the run did not finish; "
                f"continue it with 'ray-subnets resume {root}'"
            )
        return folder

    def exists(self, name: str) -> bool:
        return (self.root / name).is_file()

    def remove(self, name: str) -> None:
        (self.root / name).unlink(missing_ok=True)

    # --- bytes ---

    def write(self, name: str, content: bytes) -> Stored:
        """Write a file so that readers see the old content or the new, never a part."""
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        return Stored(file=name, sha256=hashlib.sha256(content).hexdigest())

    def read(self, file: str | Stored) -> bytes:
        """The bytes of a file; if `file` says what its hash is, they have that hash.

        Raises:
            ValueError: the file is missing, or its content is not what was written.
        """
        name = file.file if isinstance(file, Stored) else file
        path = (self.root / name).resolve()
        if not path.is_relative_to(self.root.resolve()):
            raise ValueError(
                f"{self.root}/ensemble.json: {name!r} points out of the run folder; "
                f"'ray-subnets resume {self.root}' writes it again"
            )
        try:
            content = path.read_bytes()
        except OSError as error:
            raise ValueError(
                f"{path}: cannot be read ({error.strerror}); restore it from a copy, or make it "
                f"again with 'ray-subnets resume {self.root}'"
            ) from None
        if isinstance(file, Stored) and hashlib.sha256(content).hexdigest() != file.sha256:
            raise ValueError(
                f"{path}: damaged or changed since it was written (SHA-256 differs); restore it "
                f"from a copy, or make it again with 'ray-subnets resume {self.root}'"
            )
        return content

    # --- JSON ---

    def write_json(self, name: str, value: Any) -> Stored:
        return self.write(name, (json.dumps(value, indent=1) + "\n").encode())

    def read_json(self, name: str) -> Any:
        try:
            return json.loads(self.read(name))
        except json.JSONDecodeError as error:
            raise ValueError(f"{self.root / name}: not valid JSON ({error})") from None

    # --- tensors ---

    def save_tensors(self, name: str, tensors: Mapping[str, Tensor]) -> Stored:
        """Write tensors of any device as safetensors."""
        plain = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        return self.write(name, safetensors.torch.save(plain))

    def load_tensors(self, file: str | Stored) -> dict[str, Tensor]:
        name = file.file if isinstance(file, Stored) else file
        content = self.read(file)
        try:
            return safetensors.torch.load(content)
        except (safetensors.SafetensorError, ValueError) as error:
            raise ValueError(
                f"{self.root / name}: not an intact safetensors file ({error})"
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
            raise ValueError(f"{self.root / name}: not an intact .npz file ({error})") from None
