"""Augmentation: a random view (scale, crop, mirror), and strong colours."""

from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps
from torchvision.transforms import v2

from utils import IGNORE
from utils.config.schema import AugmentSection, StrongSection


class CropParams(NamedTuple):
    """Scale, crop and mirror, the same for an image and its mask."""

    scaled: tuple[int, int]  # (height, width) the whole image is resized to
    top: int  # of the kept window, in pixels of the scaled image
    left: int
    crop: int  # side of the square result, padded at the bottom and right
    flip: bool  # mirror left and right

    def image(self, image: Image.Image, interpolation: str = "bilinear") -> Image.Image:
        """Cut an RGB picture: resize ('bilinear' or 'bicubic', antialiased), crop, pad by 0.

        The kept window alone is resampled: equal within rounding.
        """
        height, width = self._window
        rows, columns = image.height / self.scaled[0], image.width / self.scaled[1]
        box = (
            self.left * columns,
            self.top * rows,
            min((self.left + width) * columns, image.width),
            min((self.top + height) * rows, image.height),
        )
        window = image.resize((width, height), Image.Resampling[interpolation.upper()], box)
        if self.flip:
            window = window.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        border = (0, 0, self.crop - width, self.crop - height)  # none if the window fills it
        return ImageOps.expand(window, border, fill=0)

    def mask(self, mask: Image.Image) -> Image.Image:
        """Cut a mask by nearest neighbour: exactly resize, then crop; padding is 255."""
        height, width = self._window
        rows = _nearest(mask.height, self.scaled[0])[self.top : self.top + height]
        columns = _nearest(mask.width, self.scaled[1])[self.left : self.left + width]
        ids = np.full((self.crop, self.crop), IGNORE, np.uint8)
        ids[:height, :width] = np.asarray(mask)[rows][:, columns[::-1] if self.flip else columns]
        return Image.fromarray(ids)

    @property
    def _window(self) -> tuple[int, int]:
        """(height, width) of what the scaled image has for the crop."""
        return min(self.crop, self.scaled[0]), min(self.crop, self.scaled[1])


def _nearest(length: int, scaled: int) -> np.ndarray:
    """(scaled,) int: the pixel of a line that each pixel of its resized line takes.

    As Pillow's ``resize`` of the whole line, which accumulates steps: their rounding decides
    between two pixels that are equally near. Its ``resize`` of a window can decide otherwise.
    """
    steps = np.full(scaled, length / scaled)
    steps[0] /= 2
    return np.add.accumulate(steps).astype(np.intp).clip(max=length - 1)


def random_view(
    size: tuple[int, int],
    augment: AugmentSection,
    rng: np.random.Generator,
    target: tuple[int, int] | None = None,
) -> CropParams:
    """Draw a weak augmentation: long side to U(scale) x base_size, random crop, mirror.

    ``size`` is the image's (height, width), ``target`` the (row, column) of a pixel of it that the
    window must show. Source: docs/method.md, sections 5 and 13; aiming replaces unbounded retries.
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
    return CropParams(scaled, corner[0], corner[1], augment.crop_size, bool(rng.random() < 0.5))


def recolour(image: Image.Image, settings: StrongSection, rng: np.random.Generator) -> Image.Image:
    """Jitter colours, grey, blur: the strong augmentation; torch's generators keep their state.

    Source: docs/method.md, section 13; the defaults are those of ST++.
    """
    colours = v2.Compose(
        [
            v2.RandomApply([v2.ColorJitter(*settings.jitter)], p=settings.jitter_chance),
            v2.RandomGrayscale(p=settings.grey_chance),
        ]
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(rng.integers(2**63)))  # not an accelerator's
        image = colours(image)
    sigma, blurs = rng.uniform(*settings.blur), rng.random() < settings.blur_chance
    return image.filter(ImageFilter.GaussianBlur(sigma)) if blurs else image
