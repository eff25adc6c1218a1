"""Places for files: a local path or shared mount, or a URI that pyarrow opens (`s3://`, `gs://`).

Both do the same few things: read and write whole files, atomically, by name. Every failure is an
`OSError` whose message is one short line without credentials.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol

State = Literal["absent", "empty", "used", "file"]

_CONNECT, _ANSWER, _ATTEMPTS = 5.0, 15.0, 3  # seconds, seconds, tries before a server is given up
_SECRET = re.compile(r"^[\w+.-]+://[^@]*:[^@]*@")
_REASONS = {  # in what pyarrow says -> what it means here
    r"NO_SUCH_BUCKET|bucket .*not found|NoSuchBucket": "no such bucket, create it first",
    r"ACCESS_DENIED|INVALID_ACCESS_KEY|INVALID_SIGNATURE|SIGNATURE_DOES_NOT_MATCH|InvalidAccessKey"
    r"|SignatureDoesNotMatch|HTTP status 40[13]|HTTP response code 40[13]|PERMISSION_DENIED"
    r"|UNAUTHENTICATED|CREDENTIALS": "access denied: for S3 set AWS_ACCESS_KEY_ID and "
    "AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
    r"NETWORK_CONNECTION|curlCode|UNAVAILABLE|resolve host|REQUEST_TIMEOUT": "the server does not "
    "answer: is the address right (AWS_ENDPOINT_URL or ?endpoint_override=)?",
}


_UMASK = os.umask(0o077)  # who may read new files: asked once, since asking sets it
os.umask(_UMASK)


class Place(Protocol):
    """A folder. Names are relative, with `/`; all methods raise `OSError` when storage fails."""

    def path(self, name: str = "") -> str:
        """How a person would write it, also as an argument of a command."""

    def state(self) -> State:
        """What is there now."""

    def make(self) -> None:
        """Make the folder, if there is such a thing as a folder."""

    def clear(self) -> None:
        """Delete the folder and all that is in it."""

    def folders(self) -> list[str]:
        """Names of the folders in it, sorted."""

    def read(self, name: str) -> bytes: ...

    def write(self, name: str, content: bytes, *, lasting: bool = True) -> None:
        """A reader, or a crash, sees the old content or the new, never a part.

        Args:
            lasting: on the disk when this returns. Else a killed process loses nothing, but a
                machine without power may: for what has a checksum and can be made again.
        """

    def append(self, name: str, content: bytes) -> bool:
        """Add to a log whose tail may be lost; False: this place can only write whole files."""

    def size(self, name: str) -> int | None:
        """Bytes of a file; None: there is none."""

    def delete(self, name: str) -> None:
        """Delete a file if it is there."""


def place(root: str | Path) -> Place:
    """The place that a path or a URI names.

    Raises:
        ValueError: a URI that pyarrow does not open, or one with credentials in it.
    """
    text = str(root)
    if not re.match(r"^[A-Za-z][\w+.-]*://", text):
        return LocalPlace(Path(root))
    scheme = text.split("://")[0]
    if _SECRET.match(text):
        raise ValueError(
            f"{scheme}://...: leave user and password out of the address, it is written to files "
            "and logs; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
        )
    return _opened(text, scheme)


def join(root: str, name: str) -> str:
    """A name in a folder; what a URI says behind `?` stays at its end."""
    folder, mark, query = root.partition("?") if "://" in root else (root, "", "")
    return f"{folder.rstrip('/')}/{name}{mark}{query}"


def _opened(uri: str, scheme: str) -> Place:
    import pyarrow as pa
    from pyarrow import fs

    if scheme in ("gs", "gcs") and "retry_limit_seconds" not in uri:
        limit = f"retry_limit_seconds={_ANSWER * _ATTEMPTS:.0f}"  # pyarrow's own is 15 minutes
        where = uri + ("&" if "?" in uri else "?") + limit
    else:
        where = uri
    try:
        filesystem, path = fs.FileSystem.from_uri(where)
        if isinstance(filesystem, fs.S3FileSystem):
            # A URI cannot say how long to wait, and by default a server that accepts a connection
            # and says nothing is waited for without end. What the URI and the environment gave is
            # read back from what would be pickled.
            options = filesystem.__reduce__()[1][0]
            options |= {"connect_timeout": _CONNECT, "request_timeout": _ANSWER}
            retry = fs.AwsStandardS3RetryStrategy(max_attempts=_ATTEMPTS)
            filesystem = fs.S3FileSystem(**options, retry_strategy=retry)
    except (pa.ArrowException, OSError, ImportError, ValueError) as error:
        why = reason(error).replace(where, uri)
        if "Unrecognized filesystem type" in why:
            why = "unknown kind of storage; use a path, or s3://BUCKET/FOLDER, gs://BUCKET/FOLDER"
        raise ValueError(f"{uri}: {why}") from None
    if isinstance(filesystem, fs.LocalFileSystem):
        return LocalPlace(Path(path))
    folder, mark, query = uri.partition("?")
    return RemotePlace(folder.rstrip("/") + mark + query, filesystem, path.rstrip("/"))


def reason(error: BaseException) -> str:
    """One short line."""
    if isinstance(error, OSError) and error.errno is not None and error.strerror:
        known = {errno.ENOSPC: "the disk is full", errno.EROFS: "it is read-only"}
        known |= {errno.EDQUOT: "the disk quota is used up"}
        return known.get(error.errno, error.strerror)
    text = " ".join(str(error).split())
    for pattern, meaning in _REASONS.items():
        if re.search(pattern, text, re.IGNORECASE):
            return meaning
    return text[:200] or type(error).__name__


class LocalPlace:
    """A folder of this machine, or on a mount."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()

    def path(self, name: str = "") -> str:
        return str(self.root / name)

    def state(self) -> State:
        if not self.root.exists():
            return "absent"
        if not self.root.is_dir():
            return "file"
        return "used" if any(self.root.iterdir()) else "empty"

    def make(self) -> None:
        self.root.mkdir(parents=True, exist_ok=True)

    def clear(self) -> None:
        shutil.rmtree(self.root)

    def folders(self) -> list[str]:
        return sorted(path.name for path in self.root.iterdir() if path.is_dir())

    def _inside(self, name: str) -> Path:
        """The path of a file; its folder is made, but never the root: it may be a mount that is
        gone, and what is written under it then would be lost to everybody else."""
        path = self.root / name
        if not path.parent.is_dir():
            if not self.root.is_dir():
                raise FileNotFoundError(errno.ENOENT, "there is no such folder (any more)")
            path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def read(self, name: str) -> bytes:
        return (self.root / name).read_bytes()

    def write(self, name: str, content: bytes, *, lasting: bool = True) -> None:
        path = self._inside(name)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                if lasting:
                    os.fsync(file.fileno())
            os.chmod(temporary, 0o666 & ~_UMASK)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    def append(self, name: str, content: bytes) -> bool:
        with self._inside(name).open("ab") as file:
            file.write(content)
        return True

    def size(self, name: str) -> int | None:
        path = self.root / name
        return path.stat().st_size if path.is_file() else None

    def delete(self, name: str) -> None:
        (self.root / name).unlink(missing_ok=True)


@contextmanager
def _plain_errors() -> Iterator[None]:
    """pyarrow's errors as an `OSError` of one line."""
    import pyarrow as pa

    try:
        yield
    except FileNotFoundError as error:
        text = reason(error)
        raise FileNotFoundError(
            errno.ENOENT, text if "no such bucket" in text else "no such file"
        ) from None
    except (pa.ArrowException, OSError) as error:
        raise OSError(errno.EIO, reason(error)) from None


class RemotePlace:
    """A folder on a file system of pyarrow's: an object store, where one PUT is one file."""

    def __init__(self, uri: str, filesystem: Any, root: str) -> None:
        self._uri, self._filesystem, self._root = uri, filesystem, root
        self._whole = filesystem.type_name in ("s3", "gcs", "abfs")

    def path(self, name: str = "") -> str:
        return join(self._uri, name) if name else self._uri

    def _at(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    def _info(self, path: str) -> Any:
        with _plain_errors():
            return self._filesystem.get_file_info(path)

    def state(self) -> State:
        from pyarrow import fs

        kind = self._info(self._root).type
        if kind == fs.FileType.File:
            return "file"
        if kind == fs.FileType.NotFound:
            bucket = self._root.split("/")[0]
            if self._whole and self._info(bucket).type == fs.FileType.NotFound:
                raise FileNotFoundError(errno.ENOENT, "no such bucket, create it first")
            return "absent"
        with _plain_errors():
            found = self._filesystem.get_file_info(fs.FileSelector(self._root))
        return "used" if found else "empty"

    def make(self) -> None:
        if not self._whole:  # an object store makes folders of names
            with _plain_errors():
                self._filesystem.create_dir(self._root)

    def clear(self) -> None:
        with _plain_errors():
            if "/" in self._root:
                self._filesystem.delete_dir(self._root)
            else:  # a bucket of its own stays
                self._filesystem.delete_dir_contents(self._root)

    def folders(self) -> list[str]:
        from pyarrow import fs

        with _plain_errors():
            found = self._filesystem.get_file_info(fs.FileSelector(self._root))
        return sorted(info.base_name for info in found if info.type == fs.FileType.Directory)

    def read(self, name: str) -> bytes:
        with _plain_errors(), self._filesystem.open_input_file(self._at(name)) as file:
            return file.read()

    def write(self, name: str, content: bytes, *, lasting: bool = True) -> None:
        # A stream of pyarrow's cannot be given up: closing it commits what it has. In a thread of
        # its own Ctrl-C cannot come between opening it and closing it.
        with ThreadPoolExecutor(1) as thread, _plain_errors():
            thread.submit(self._put, name, content).result()

    def _put(self, name: str, content: bytes) -> None:
        path = self._at(name)
        if self._whole:
            with self._filesystem.open_output_stream(path) as file:
                file.write(content)
            return
        self._filesystem.create_dir(path.rpartition("/")[0])
        temporary = f"{path}.{os.getpid()}.part"
        with self._filesystem.open_output_stream(temporary) as file:
            file.write(content)
        self._filesystem.move(temporary, path)

    def append(self, name: str, content: bytes) -> bool:
        return False

    def size(self, name: str) -> int | None:
        from pyarrow import fs

        info = self._info(self._at(name))
        return info.size if info.type == fs.FileType.File else None

    def delete(self, name: str) -> None:
        if self.size(name) is not None:
            with _plain_errors():
                self._filesystem.delete_file(self._at(name))
