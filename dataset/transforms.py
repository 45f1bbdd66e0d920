"""Augmentation: one window of the scaled image, mirrored or not; and strong colours."""

from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps
from torchvision.transforms import v2

from utils import IGNORE
from utils.config import AugmentSection, StrongSection


class View(NamedTuple):
    """What of an image is kept; the same view of its mask fits it pixel by pixel.

    Attributes:
        scaled: (height, width) the whole image is resized to.
        top, left: of the kept window, in pixels of the scaled image.
        crop: side of the square result; what the scaled image does not fill is padding, at the
            bottom and right.
        flip: mirror left and right.
    """

    scaled: tuple[int, int]
    top: int
    left: int
    crop: int
    flip: bool

    def image(self, image: Image.Image) -> Image.Image:
        """Cut an RGB picture, antialiased; padding is 0."""
        return self._cut(image, Image.Resampling.BILINEAR, 0)

    def mask(self, mask: Image.Image) -> Image.Image:
        """Cut a mask by nearest neighbour; padding is 255."""
        return self._cut(mask, Image.Resampling.NEAREST, IGNORE)

    def _cut(self, picture: Image.Image, resample: Image.Resampling, padding: int) -> Image.Image:
        """Resample the kept window alone: the same pixels as resize, then crop."""
        height, width = (min(self.crop, side) for side in self.scaled)
        rows, columns = picture.height / self.scaled[0], picture.width / self.scaled[1]
        box = (
            self.left * columns,
            self.top * rows,
            min((self.left + width) * columns, picture.width),
            min((self.top + height) * rows, picture.height),
        )
        window = picture.resize((width, height), resample, box)
        if self.flip:
            window = window.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        border = (0, 0, self.crop - width, self.crop - height)  # none if the window fills it
        return ImageOps.expand(window, border, fill=padding)


def random_view(
    size: tuple[int, int],
    augment: AugmentSection,
    rng: np.random.Generator,
    target: tuple[int, int] | None = None,
) -> View:
    """Draw a weak augmentation: long side to U(scale) x base_size, random crop, mirror.

    Args:
        size: (height, width) of the image.
        augment: base size, range of scales, crop size.
        rng: the sample's random numbers.
        target: (row, column) of a pixel of the image that the window must show.

    Source: METHOD's published settings; aiming at a pixel replaces unbounded retries.
    """
    long_side = rng.uniform(*augment.scale) * augment.base_size
    scaled = tuple(max(1, round(side * long_side / max(size))) for side in size)
    corner = []
    for axis in (0, 1):
        first, last = 0, max(0, scaled[axis] - augment.crop_size)
        if target is not None:
            aim = int((target[axis] + 0.5) * scaled[axis] / size[axis])
            first = min(max(first, aim - augment.crop_size + 1), last)
            last = max(min(last, aim), first)
        corner.append(int(rng.integers(first, last, endpoint=True)))
    return View(scaled, corner[0], corner[1], augment.crop_size, bool(rng.random() < 0.5))


class StrongColours:
    """Colour jitter, grey, blur: the strong augmentation of unlabeled images.

    Source: METHOD's published settings, those of ST++, are the section's defaults.
    """

    def __init__(self, settings: StrongSection) -> None:
        self._blur, self._blur_chance = settings.blur, settings.blur_chance
        self._colours = v2.Compose(
            [
                v2.RandomApply([v2.ColorJitter(*settings.jitter)], p=settings.jitter_chance),
                v2.RandomGrayscale(p=settings.grey_chance),
            ]
        )

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        """Recolour an RGB picture; torch's own random numbers stay as they were."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(rng.integers(2**63)))  # not an accelerator's
            image = self._colours(image)
        sigma, blurs = rng.uniform(*self._blur), rng.random() < self._blur_chance
        return image.filter(ImageFilter.GaussianBlur(sigma)) if blurs else image
