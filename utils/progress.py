"""Progress bars, the means of an epoch, and the time that is left of a run."""

import math
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from utils.distributed import is_first, reduced


def no_bar() -> bool | None:
    """Return tqdm's ``disable``; None: draw where stderr is a terminal."""
    return None if is_first() else True


class Work(NamedTuple):
    """What a stage is going to do."""

    kind: str  # work of one kind has one speed
    amount: float  # in a unit that makes kinds roughly comparable


def seconds_left(
    plan: Mapping[str, Work],
    seconds: Mapping[str, float],
    running: str | None = None,
    share: float = 0.0,
) -> float | None:
    """Estimate the time left of a run from the speeds of its stages.

    Args:
        plan: the work of each stage, by name, in order.
        seconds: that a stage took; of the running one, until now.
        running: name of the stage that has not ended.
        share: of its work that is done.

    Returns:
        Seconds. Work of a kind that was measured goes on at its mean speed, other work at that of
        all work. None if nothing was measured.
    """
    done = {name: plan[name].amount * (share if name == running else 1) for name in seconds}

    def speed(kind: str | None) -> float:
        alike = [name for name in done if kind in (None, plan[name].kind) and done[name]]
        took = sum(seconds[name] for name in alike)
        return sum(done[name] for name in alike) / took if took else 0.0

    if not speed(None):
        return None
    return sum(
        (work.amount - done.get(name, 0.0)) / (speed(work.kind) or speed(None))
        for name, work in plan.items()
    )


def clock(seconds: float) -> str:
    """Return a time as ``m:ss`` or ``h:mm:ss``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class RunBar:
    """A bar over all stages of a run, with the time left of it; drawn where stderr is a terminal.

    Args:
        plan: the work of each stage, by name, in order; may be empty.
    """

    def __init__(self, plan: Mapping[str, Work]) -> None:
        self._plan, self._seconds = plan, dict[str, float]()
        layout = "{desc} |{bar}| {percentage:3.0f} %{postfix}"
        self._bar = tqdm(total=1.0, bar_format=layout, disable=no_bar(), leave=False)

    @property
    def hidden(self) -> bool:
        """Whether stderr is no terminal."""
        return bool(self._bar.disable)

    def show(self, stage: str, seconds: float, share: float) -> None:
        """Draw how far a stage has come, after so many seconds of it."""
        if stage not in self._plan:
            return
        taken = {**self._seconds, stage: seconds}
        left = seconds_left(self._plan, taken, stage, share)
        elapsed, names = sum(taken.values()), list(self._plan)
        self._bar.n = 0.0 if left is None else elapsed / max(elapsed + left, 1e-9)
        place = f"stage {names.index(stage) + 1} of {len(names)}: {stage}"
        self._bar.set_description_str(place, refresh=False)
        told = "" if left is None else f"about {clock(left)} left of the run"
        self._bar.set_postfix_str(told)

    def end(self, stage: str, seconds: float) -> str:
        """Count a stage that has ended; return words on the time left, empty if none is."""
        self._seconds[stage] = seconds
        counted = {name: took for name, took in self._seconds.items() if name in self._plan}
        left = seconds_left(self._plan, counted)
        if left is None or all(name in counted for name in self._plan):
            return ""
        return f"; about {clock(left)} left of the run"

    def close(self) -> None:
        """Clear the bar."""
        self._bar.close()


class StageBar(AbstractContextManager):
    """A bar over all epochs of a stage: epoch, loss terms, rate, images a second, time left.

    The end of a ``with`` block clears it. Where stderr is no terminal nothing is drawn.

    Args:
        stage: name of the stage.
        iterations: of the whole stage.
        steps: iterations an epoch.
        images: labeled and unlabeled images that the student sees an iteration.
        drawn: is told the share of the stage that is done whenever the bar is drawn anew.
    """

    def __init__(
        self,
        stage: str,
        iterations: int,
        steps: int,
        images: int,
        drawn: Callable[[float], None] = lambda share: None,
    ) -> None:
        self._stage, self._epochs, self._images = stage, math.ceil(iterations / steps), images
        self._drawn = drawn
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
        values = reduced(torch.stack(list(terms.values())))
        for name, value in zip(terms, values, strict=True):
            self._sums[name] = value + self._sums.get(name, 0.0)
        # Reading a scalar waits for the device: only when the bar is redrawn.
        if self._bar.update(self._images):
            means = {name: f"{value:.3g}" for name, value in self._means().items()}
            self._bar.set_postfix({**means, "lr": f"{lr:.2g}"}, refresh=False)
            self._drawn(self._bar.n / self._bar.total)

    def means(self) -> dict[str, float]:
        """Return the epoch's mean of each scalar, its last learning rate, and images a second."""
        seconds = max(time.monotonic() - self._started, 1e-9)
        speed = self._images * self._steps / seconds
        return {**self._means(), "lr": self._lr, "images_per_second": speed}

    def _means(self) -> dict[str, float]:
        return {name: float(value) / self._steps for name, value in self._sums.items()}
