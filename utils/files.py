"""Files that are whole or absent."""

import csv
import errno
import hashlib
import io
import json
import math
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from utils.errors import UserError

_BLOCK = 1 << 20  # bytes


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a failed write into a ``UserError``: a full disk, or a place that cannot be written."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path}: cannot write this file ({error.strerror or error}); make room there, or name "
            "another place; what was done is kept"
        ) from error


def write_atomically(path: Path, write: Callable[[Path], None], durable: bool = True) -> None:
    """Write beside ``path``, then rename: a kill or a power cut leaves the old file or the new one.

    A link stays, and its target is written; a file that is replaced hands its mode on. What is no
    regular file, such as /dev/null or a named pipe, takes the content and stays.

    Args:
        path: where the file goes; its folder is made.
        write: writes the file whose path it is given.
        durable: wait for the disk. Without it a power cut, not a kill, may leave a part of the file
            until ``os.sync``.

    Raises:
        UserError: as ``writing``; a folder is there, or a file that is not to be written to.
    """
    with writing(path):
        if path.exists() and not path.is_file():
            _write_through(path, write)
            return
        target = Path(os.path.realpath(path))
        partial = target.with_name(f".{target.name}.partial")
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists() and not os.access(target, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        try:
            write(partial)
            if target.exists():
                shutil.copymode(target, partial)
            if durable:
                _flush(partial)  # else the rename may reach the disk before the content
            partial.replace(target)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        if durable:
            _flush(target.parent)


def _write_through(path: Path, write: Callable[[Path], None]) -> None:
    """Write a file elsewhere, and its content to a device or a pipe."""
    with path.open("wb") as file, TemporaryDirectory() as folder:  # opening refuses a folder
        content = Path(folder) / path.name
        write(content)
        with content.open("rb") as made:
            shutil.copyfileobj(made, file)


def _flush(path: Path) -> None:
    """Wait until the disk has a file's content, or a folder's names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def in_background(threads: int) -> Iterator[Callable[..., Future]]:
    """Yield a function that calls others in threads, as ``submit`` of an executor, and ends them.

    For encoding and writing while the device goes on: both let other threads run. Where two calls
    a thread wait, the next one waits for the oldest of them, and raises what that raised, as a full
    disk; so does the end of the block.
    """
    waiting: deque[Future] = deque()

    def submit(work: Callable[..., Any], *args: Any) -> Future:
        if len(waiting) >= 2 * threads:
            waiting.popleft().result()
        waiting.append(pool.submit(work, *args))
        return waiting[-1]

    with ThreadPoolExecutor(threads) as pool:
        yield submit
        for work in waiting:
            work.result()


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    write_atomically(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write a table atomically."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    write_text(path, text.getvalue())


def read_text(path: Path) -> str:
    """Read UTF-8 text, with or without a byte order mark.

    Raises:
        UserError: the file cannot be read, or is no such text.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: cannot read this as UTF-8 text ({error}); correct it, or name another file"
        ) from error


def append_text(path: Path, text: str) -> None:
    """Append UTF-8 text; a killed run may leave a part of the last line."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(text)


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON atomically; numbers that are not finite, which it has not, as null."""
    write_text(path, json.dumps(_finite(value), indent=2, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(path: Path) -> Any:
    """Read JSON.

    Raises:
        UserError: no such file, or no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: holds no JSON ({error}); restore or delete it") from error


def read_records(path: Path) -> list[dict[str, Any]]:
    """Read JSON objects, one a line; skip lines that are none. Empty if there is no such file."""
    records = []
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        with suppress(ValueError, RecursionError):
            records.append(json.loads(line))
    return [record for record in records if isinstance(record, dict)]


def text_digest(text: str) -> str:
    """Return the sha256 of a text, in hex digits."""
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def sha256(path: Path) -> str:
    """Return the sha256 of a file, in hex digits; raises as ``file_digest``."""
    return file_digest(path, "sha256")


def file_digest(path: Path, algorithm: str) -> str:
    """Return the hex digest of a file, by an algorithm of ``hashlib``.

    Raises:
        UserError: it cannot be read.
    """
    digest = hashlib.new(algorithm, usedforsecurity=False)
    try:
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
    except OSError as error:
        raise UserError(
            f"{path}: cannot read this file ({error.strerror}); delete it or name another place"
        ) from error
    return digest.hexdigest()
