"""Aimed crops: rare classes are shown oftener than their pixels are (section 13)."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from dataset.lists import Sample, read_label
from utils import IGNORE


class ClassAim(NamedTuple):
    """Draws classes that crops are aimed at: chances are shares of the labeled pixels to a power.

    An aim of 0 draws a class as often as a pixel of it is met, 1 draws all classes equally often.
    """

    chances: np.ndarray  # (255,) float by class id, adds up to 1; 0: no labeled image shows it
    shown: np.ndarray  # (images, 255) bool, by position in the labeled list and class id

    @classmethod
    def of(cls, labeled: Sequence[Sample], aim: float) -> "ClassAim":
        """Read all labels, and raise the classes' shares to the power 1 - ``aim``."""
        pixels = np.stack([_pixels_by_class(read_label(sample)) for sample in labeled])
        total = pixels.sum(axis=0)
        chances = np.where(total > 0, (total / total.sum()) ** (1 - aim), 0.0)
        return cls(chances / chances.sum(), pixels > 0)

    def draw_image(self, rng: np.random.Generator) -> tuple[int, int]:
        """Draw a class, then one of the images that show it: position in the list, class id."""
        label = int(rng.choice(IGNORE, p=self.chances))
        return int(rng.choice(np.flatnonzero(self.shown[:, label]))), label

    def draw_class(self, mask: Image.Image, rng: np.random.Generator) -> int | None:
        """Draw a class of those that a mask shows; None if no labeled image shows one of them."""
        chances = np.where(_pixels_by_class(mask) > 0, self.chances, 0.0)
        return int(rng.choice(IGNORE, p=chances / chances.sum())) if chances.any() else None


def random_pixel(mask: Image.Image, label: int, rng: np.random.Generator) -> tuple[int, int]:
    """Draw one of the pixels of a class that a mask shows: (row, column)."""
    places = np.flatnonzero(np.asarray(mask) == label)
    return divmod(int(places[rng.integers(len(places))]), mask.width)


def _pixels_by_class(mask: Image.Image) -> np.ndarray:
    """Count the pixels of each class id: (255,) int."""
    return np.bincount(np.asarray(mask).ravel(), minlength=IGNORE + 1)[:IGNORE]
