"""A lock on a run folder: two runs in one would spoil each other's files."""

import fcntl
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from utils.errors import UserError
from utils.files import writing


@contextmanager
def locked(path: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Hold a lock while the block runs. A killed process holds none: the system lets go for it.

    Args:
        path: a file that says who holds the lock; empty when nobody does.
        say: told of the lock of a process that is gone.

    Raises:
        UserError: another process holds it; or one on another machine did and never let go.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+", encoding="utf-8", errors="replace")
    with file:
        with writing(path):  # some network file systems know no locks
            before = _take(file, path)
        if before:
            say(f"{path}: taken over from {before}, which is gone")
        _write(file, f"pid {os.getpid()} on {platform.node()}")
        try:
            yield
        finally:
            _write(file, "")


def _take(file: TextIO, path: Path) -> str:
    """Lock the file; return who held it last without letting go."""
    try:
        # A record lock: unlike flock's, the processes that read images do not inherit it.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        held = False
    except (BlockingIOError, PermissionError):
        held = True
    file.seek(0)
    holder = " ".join(file.read(200).split())
    if held:
        raise UserError(
            f"{path}: another run works in this folder ({holder}); wait for it, stop it, or set "
            "name=... for another run"
        )
    if holder and not holder.endswith(f" on {platform.node()}"):
        # Not every file system tells machines of each other's locks.
        raise UserError(
            f"{path}: a run on another machine works in this folder or was killed ({holder}); if "
            "it was killed, delete this file"
        )
    return holder


def _write(file: TextIO, holder: str) -> None:
    file.seek(0)
    file.truncate()
    file.write(holder)
    file.flush()
