"""The one error that users see."""

import sys
from collections.abc import Callable, Sequence


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


def exit_with_one_line(program: Callable[[], None]) -> None:
    """Run a program; a ``UserError`` ends it with its line on stderr and exit code 2.

    Ctrl-C ends it with 130, as shells have it.
    """
    try:
        program()
    except UserError as error:
        print(f"error: {error}", *error.rows, sep="\n  ", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        sys.exit(130)
