"""SIGINT and SIGTERM: finish what is at hand, then stop; a second one ends the program at once."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Thread
from types import FrameType

from utils.distributed import largest, world
from utils.errors import Stopped

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_ECHO = 5.0  # seconds; torchrun hands on a signal that a cluster has sent to every process anyway


class _StopLater:
    """A signal handler that remembers the first signal for ``stop_here``."""

    def __init__(self) -> None:
        self.caught, self.stopping, self._since = 0, False, 0.0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if not self.caught:
            self.caught, self._since = number, time.monotonic()
        elif world() == 1 or (not self.stopping and time.monotonic() - self._since > _ECHO):
            os._exit(128 + number)  # torchrun sends another to those that save yet


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
    """Mark a place where the program can stop and go on later. Collective.

    Raises:
        Stopped: a signal came, to this process or another, since ``stopping_later`` began.
    """
    number = largest(_caught())
    if number:
        handler = signal.getsignal(signal.SIGTERM)
        if isinstance(handler, _StopLater):
            handler.stopping = True
        raise Stopped(number)


def shall_stop() -> bool:
    """Tell whether a signal came to this process, which should hurry to ``stop_here``."""
    return _caught() != 0


def _caught() -> int:
    handler = signal.getsignal(signal.SIGTERM)
    return handler.caught if isinstance(handler, _StopLater) else 0


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
