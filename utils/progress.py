"""Progress bars: where an epoch stands, and what it came to."""

import time
from types import TracebackType

import torch
from torch import Tensor
from tqdm import tqdm


class EpochBar:
    """The bar of a training epoch; averages the terms of the loss. Use it in a ``with`` block.

    Args:
        title: stage and epoch.
        steps: iterations.
        images: labeled and unlabeled images that the student sees an iteration.
    """

    def __init__(self, title: str, steps: int, images: int) -> None:
        self._bar = tqdm(total=steps, desc=title, disable=None, leave=False, unit="it")
        self._steps, self._images = 0, images
        self._sums: dict[str, Tensor] = {}
        self._start = time.monotonic()
        self._lr = 0.0

    def __enter__(self) -> "EpochBar":
        """Open the bar."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Clear the bar."""
        self._bar.close()

    def update(self, terms: dict[str, Tensor], lr: float) -> None:
        """Count an iteration with its scalar loss terms, which stay on their device."""
        self._steps, self._lr = self._steps + 1, lr
        for name, term in terms.items():
            self._sums[name] = self._sums.get(name, torch.zeros_like(term)) + term.detach()
        if not self._bar.disable:
            shown = {name: f"{value:.3g}" for name, value in self.means().items()}
            self._bar.set_postfix(shown, refresh=False)
        self._bar.update()

    def means(self) -> dict[str, float]:
        """Return the mean of each term so far, the learning rate, and images a second."""
        seconds = max(time.monotonic() - self._start, 1e-9)
        means = {name: total.item() / self._steps for name, total in self._sums.items()}
        speed = self._images * self._steps / seconds
        return {**means, "lr": self._lr, "images_per_second": speed}
