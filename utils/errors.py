"""The one error that users see, and how a program ends."""

import argparse
import errno
import io
import os.path
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

_OF_PATHS = (errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES, errno.EPERM)


class UserError(Exception):
    """A mistake outside the program: one line with the file or key, what is wrong, what to do.

    Args:
        message: the line.
        rows: a short table below it, where a line cannot hold what differs.
    """

    def __init__(self, message: str, rows: Sequence[str] = ()) -> None:
        # A DataLoader worker passes its error as the text of a traceback that ends in ours.
        super().__init__(" ".join(message.rsplit(f"\n{__name__}.UserError: ", 1)[-1].split()))
        self.rows = rows


class Stopped(BaseException):
    """A signal asked the program to end, and it has come to a place where it can."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


class Parser(argparse.ArgumentParser):
    """A command line whose mistakes are errors like all others; its help keeps line breaks."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        named.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(*arguments, **named)

    def error(self, message: str) -> NoReturn:
        """Raise argparse's complaint as a ``UserError``."""
        raise UserError(f"{self.prog}: {message}; {self.prog} --help lists what there is")


def refuse_repeated(places: Iterable[str | Path]) -> None:
    """Refuse a command line that names one file or folder twice, which would count once, or twice.

    Raises:
        UserError: names it.
    """
    seen: set[str] = set()
    for place in places:
        real = os.path.realpath(place)
        if real in seen:
            raise UserError(f"{place}: is named twice; name it once")
        seen.add(real)


def exit_with_one_line(program: Callable[[], None]) -> None:
    """Run a program; a ``UserError`` ends it with its line on stderr and exit code 2.

    SIGINT and SIGTERM end it with the shells' codes, 130 and 143.
    """
    for stream in (sys.stdout, sys.stderr):  # names of classes and files, on an ASCII terminal
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        program()
        sys.stdout.flush()
    except UserError as error:
        _exit(2, "\n  ".join([f"error: {error}", *error.rows]))
    except (RuntimeError, MemoryError, OSError, EOFError) as error:
        _forget_workers()
        line = _line_of(error)
        if line is None:
            raise
        _exit(2, f"error: {line}")
    except Stopped as stopped:
        _forget_workers()
        hint = "the same command, without --from-stage and --fresh, continues from the last save"
        _exit(128 + stopped.number, f"{stopped}; {hint}")
    except KeyboardInterrupt:
        _forget_workers()
        _exit(130, "interrupted; the same command continues")


def _forget_workers() -> None:
    """Take off torch's handler, which raises for each worker of a DataLoader that ends."""
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def _exit(code: int, line: str) -> NoReturn:
    print(line, file=sys.stderr)
    sys.exit(code)


def _line_of(error: RuntimeError | MemoryError | OSError | EOFError) -> str | None:
    """Say in a line what a user can do about an error of torch or the system; None if nothing."""
    what = str(error).split("\n")[0].split(". ")[0]
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    if any(frame.f_code.co_name == "rebuild_storage_fd" for frame in frames):
        what = "DataLoader worker (pid unknown) ended while it handed over a batch"
    if what.startswith("DataLoader worker (pid"):  # raised wherever the program is
        hint = "if memory ran out lower workers; the same command continues"
        return f"workers: {what}, a process that reads images; {hint}"
    if isinstance(error, OSError) and error.errno == errno.EMFILE:
        return "files: the system lets this program open no more; raise its limit (ulimit -n 4096)"
    if isinstance(error, OSError) and error.errno in _OF_PATHS and error.filename is not None:
        shown = str(error.filename)
        shown = shown if len(shown) < 200 else f"{shown[:200]}..."
        return f"{shown}: {error.strerror}; correct the path, or who may read it"
    if isinstance(error, OSError) and error.errno in (errno.EPIPE, errno.ENOSPC):
        sys.stdout = (
            None  # where writing a file fails there is a UserError; nothing is left to print
        )
        return f"standard output: {error.strerror}; not all was printed"
    known = ("can't allocate memory", "could not create a primitive", "not enough memory")
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or any(
        x in str(error) for x in known
    ):
        return (
            f"memory: {what or 'there is no more'}; raise supervised.accumulate in stage 1, "
            "retrain.accumulate in stages 4 and 6, lower inference.batch_size or set "
            "inference.window={size: 512} in the others; the same command with these settings "
            "continues"
        )
    return None
