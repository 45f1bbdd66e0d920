"""The one error that users see, and how a program ends."""

import argparse
import signal
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

import torch


class UserError(Exception):
    """A mistake outside the program: one line with the file or key, what is wrong, what to do.

    Args:
        message: the line.
        rows: a short table below it, where a line cannot hold what differs.
    """

    def __init__(self, message: str, rows: Sequence[str] = ()) -> None:
        # A DataLoader worker hands its error over as the text of a traceback that ends in ours.
        super().__init__(" ".join(message.rsplit(f"\n{__name__}.UserError: ", 1)[-1].split()))
        self.rows = rows


class Stopped(BaseException):
    """A signal asked the program to end, and it has come to a place where it can."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


class Parser(argparse.ArgumentParser):
    """A command line whose mistakes are errors like all others."""

    def error(self, message: str) -> NoReturn:
        """Raise argparse's complaint as a ``UserError``."""
        raise UserError(f"{self.prog}: {message}; {self.prog} --help lists what there is")


def exit_with_one_line(program: Callable[[], None]) -> None:
    """Run a program; a ``UserError`` ends it with its line on stderr and exit code 2.

    SIGINT and SIGTERM end it with 130 and 143, as shells have it.
    """
    code, line = _run(program)
    if code:
        print(line, file=sys.stderr)
        sys.exit(code)


def _run(program: Callable[[], None]) -> tuple[int, str]:
    """Return a program's exit code and last words."""
    try:
        program()
    except UserError as error:
        return 2, "\n  ".join([f"error: {error}", *error.rows])
    except RuntimeError as error:
        line = _line_of(error)
        if line is None:
            raise
        return 2, f"error: {line}"
    except Stopped as stopped:
        hint = "the same command, without --from-stage and --fresh, goes on"
        return 128 + stopped.number, f"{stopped}, all that is done is saved; {hint}"
    except KeyboardInterrupt:
        return 130, "interrupted; the same command goes on"
    return 0, ""


def _line_of(error: RuntimeError) -> str | None:
    """Say in a line what torch and the system complain about, if a user can do something."""
    what = str(error).split(". ")[0].splitlines()[0] if str(error) else ""
    # Raised wherever the program is when the system tells of a worker's death.
    if what.startswith("DataLoader worker (pid"):
        hint = "if memory ran out take fewer; the same command goes on"
        return f"workers: {what}, a process that reads images; {hint}"
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        return (
            f"memory: {what}; raise supervised.accumulate and retrain.accumulate, or lower "
            "batch_size, augment.crop_size or inference.batch_size; what was done is kept"
        )
    return None
