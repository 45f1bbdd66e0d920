"""What training steps came to, told one step late, so that the host never waits for the device."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from utils.optimization import StepOutcome


class Later:
    """A tensor on its way from a device, which works on meanwhile."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor.to("cpu", non_blocking=tensor.is_cuda)
        self._copied = torch.cuda.Event() if tensor.is_cuda else None
        if self._copied is not None:
            self._copied.record()

    def read(self) -> Tensor:
        """Return it, on the CPU, as soon as it is there."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._tensor


class _Open(NamedTuple):
    """A step that nobody has asked about."""

    epoch: int
    step: int
    outcome: Later


class Outcomes:
    """The outcomes of a stage's steps; each is looked at when the next one is under way.

    Args:
        leave_out: told epoch and step, counted from 0, and loss of a step that was not finite.
    """

    def __init__(self, leave_out: Callable[[int, int, float], None]) -> None:
        self._leave_out = leave_out
        self._open: _Open | None = None

    def add(self, epoch: int, step: int, outcome: StepOutcome) -> None:
        """Take the outcome of a step, and look at that of the step before."""
        self.settle()
        self._open = _Open(epoch, step, Later(torch.stack([outcome.loss, outcome.finite])))

    def settle(self) -> None:
        """Look at the last outcome now: before anything is saved."""
        if self._open is None:
            return
        (epoch, step, outcome), self._open = self._open, None
        loss, finite = outcome.read().tolist()
        if not finite:
            self._leave_out(epoch, step, loss)
