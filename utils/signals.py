"""SIGINT and SIGTERM: finish what is at hand, then stop; a second one ends the program at once."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Thread
from types import FrameType

from utils.errors import Stopped

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class _StopLater:
    """A signal handler that remembers the first signal for ``stop_here``."""

    def __init__(self) -> None:
        self.caught: int | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.caught is not None:
            os._exit(128 + number)
        self.caught = number


@contextmanager
def stopping_later() -> Iterator[None]:
    """Hold SIGINT and SIGTERM back until the program calls ``stop_here``."""
    handler = _StopLater()
    before = {number: signal.signal(number, handler) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def stop_here() -> None:
    """Mark a place where the program can stop and go on later.

    Raises:
        Stopped: a signal came since ``stopping_later`` began.
    """
    handler = signal.getsignal(signal.SIGTERM)
    if isinstance(handler, _StopLater) and handler.caught is not None:
        raise Stopped(handler.caught)


def leave_to_parent(worker: int) -> None:
    """Let a process that reads images outlive a signal to all processes: its parent ends it.

    Args:
        worker: its number, which a ``DataLoader`` hands over.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # macOS has none
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Wait for the SIGTERM that a parent ends its workers with."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
