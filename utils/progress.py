"""Progress bars and the means of an epoch."""

import math
import time
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from utils.distributed import all_reduce_sum, is_first


def no_bar() -> bool | None:
    """Return tqdm's ``disable``; None: draw where stderr is a terminal."""
    return None if is_first() else True


def clock(seconds: float) -> str:
    """Return a time as ``m:ss`` or ``h:mm:ss``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class StageBar(AbstractContextManager):
    """A bar over all epochs of a stage: epoch, loss terms, rate, images a second, time left.

    The end of a ``with`` block clears it. Where stderr is no terminal nothing is drawn.

    Args:
        stage: name of the stage.
        iterations: of the whole stage.
        steps: iterations an epoch.
        images: labeled and unlabeled images that the student sees an iteration.
    """

    def __init__(
        self,
        stage: str,
        iterations: int,
        steps: int,
        images: int,
    ) -> None:
        self._stage, self._epochs, self._images = stage, math.ceil(iterations / steps), images
        self._an_epoch, total = steps * images, iterations * images
        self._bar = tqdm(total=total, unit="img", unit_scale=True, disable=no_bar(), leave=False)

    def __exit__(self, *_: object) -> None:
        """Clear the bar."""
        self._bar.close()

    def start(self, epoch: int, seen: dict[str, Any]) -> None:
        """Begin the means of an epoch, counted from 0, or continue those that ``seen`` holds.

        Args:
            epoch: of the stage.
            seen: ``state_dict`` of an interrupted run of this epoch; empty if there is none.
        """
        self._sums: dict[str, Tensor] = dict(seen.get("sums", {}))
        self._steps, self._lr = seen.get("steps", 0), seen.get("lr", 0.0)
        self._started = time.monotonic() - seen.get("seconds", 0.0)
        done = epoch * self._an_epoch + self._steps * self._images
        if self._bar.n == 0:
            self._bar.initial = done  # earlier iterations do not count in the speed
        self._bar.n = done
        self._bar.set_description(f"{self._stage} epoch {epoch + 1}/{self._epochs}")

    def state_dict(self) -> dict[str, Any]:
        """Return what ``start`` takes to continue the epoch."""
        seconds = time.monotonic() - self._started
        return {"sums": self._sums, "steps": self._steps, "lr": self._lr, "seconds": seconds}

    def update(self, terms: dict[str, Tensor], lr: float) -> None:
        """Count an iteration: this process's part of the logged scalars, and the learning rate.

        Collective.
        """
        self._steps, self._lr = self._steps + 1, lr
        values = all_reduce_sum(torch.stack(list(terms.values())))
        for name, value in zip(terms, values, strict=True):
            self._sums[name] = value + self._sums.get(name, 0.0)
        # Reading a scalar waits for the device: only when the bar is redrawn.
        if self._bar.update(self._images):
            means = {name: f"{value:.3g}" for name, value in self._means().items()}
            self._bar.set_postfix({**means, "lr": f"{lr:.2g}"}, refresh=False)

    def means(self) -> dict[str, float]:
        """Return the epoch's mean of each scalar, its last learning rate, and images a second."""
        seconds = max(time.monotonic() - self._started, 1e-9)
        speed = self._images * self._steps / seconds
        return {**self._means(), "lr": self._lr, "images_per_second": speed}

    def _means(self) -> dict[str, float]:
        return {name: float(value) / self._steps for name, value in self._sums.items()}
