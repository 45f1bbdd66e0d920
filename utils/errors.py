"""The one error that users see."""

import sys
from collections.abc import Callable


class UserError(Exception):
    """A mistake outside the program: one line with the file or key, what is wrong, what to do."""

    def __init__(self, message: str) -> None:
        # A DataLoader worker hands its error over as the text of a traceback that ends in ours.
        super().__init__(" ".join(message.rsplit("UserError: ", 1)[-1].split()))


def exit_with_one_line(program: Callable[[], None]) -> None:
    """Run a program; a ``UserError`` ends it with one line on stderr and exit code 2."""
    try:
        program()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
