"""SIGINT and SIGTERM: a run finishes its iteration, saves, and ends."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from utils.distributed import largest
from utils.errors import Stopped


class _StopLater:
    """A signal handler that remembers the first signal for ``stop_here``."""

    caught = 0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.caught = self.caught or number
        # The next Ctrl-C ends the program at once. The next SIGTERM does not: torchrun sends its
        # own after one that a scheduler has sent to every process.
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def defer_signals() -> Iterator[None]:
    """Hold SIGINT and SIGTERM back until the program calls ``stop_here``.

    Raises:
        Stopped: an error came after a signal. Workers and other processes may have got the signal
            too, and their end raises an error wherever this process is, even where it saves. What
            was saved before remains.
    """
    handler = _StopLater()
    before = {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    except Exception as error:
        if handler.caught:
            raise Stopped(handler.caught) from error
        raise
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def stop_here() -> None:
    """Mark a place where the program can stop and continue later. Collective.

    Raises:
        Stopped: a signal came, to this process or another, since ``defer_signals`` began.
    """
    number = largest(shall_stop())
    if number:
        raise Stopped(number)


def shall_stop() -> int:
    """Return the signal that came to this process, 0 if none: then hurry to ``stop_here``."""
    handler = signal.getsignal(signal.SIGTERM)
    return handler.caught if isinstance(handler, _StopLater) else 0


def ignore_interrupts(worker: int) -> None:
    """Make a ``DataLoader`` worker ignore Ctrl-C, which the terminal sends to it too."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
