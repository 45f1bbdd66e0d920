"""Augmentation: a random view (scale, crop, mirror, turns), and strong colours."""

import math
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps
from torchvision.transforms import v2

from utils import IGNORE
from utils.config.schema import AugmentSection, StrongSection

_QUARTER_TURNS = (
    None,
    Image.Transpose.ROTATE_90,
    Image.Transpose.ROTATE_180,
    Image.Transpose.ROTATE_270,
)


class CropParams(NamedTuple):
    """Scale, crop and turns, the same for an image and its mask."""

    scaled: tuple[int, int]  # (height, width) the whole image is resized to
    top: int  # of the kept window, in pixels of the scaled image; rotated, it may be outside
    left: int
    crop: int  # side of the square result, padded at the bottom and right; rotated, all around
    flip: bool  # mirror left and right
    vertical: bool = False  # mirror up and down
    quarters: int = 0  # quarter turns counterclockwise, after mirroring
    angle: float = 0.0  # degrees counterclockwise about the window's centre, before mirroring

    def image(self, image: Image.Image, interpolation: str = "bilinear") -> Image.Image:
        """Cut an RGB picture: resize ('bilinear' or 'bicubic', antialiased), crop, turn, pad by 0.

        The kept window alone is resampled: equal within rounding.
        """
        top, left, bottom, right = self._window
        rows, columns = image.height / self.scaled[0], image.width / self.scaled[1]
        box = (
            left * columns,
            top * rows,
            min(right * columns, image.width),
            min(bottom * rows, image.height),
        )
        resample = Image.Resampling[interpolation.upper()]
        return self._turn(image.resize((right - left, bottom - top), resample, box), resample, 0)

    def mask(self, mask: Image.Image) -> Image.Image:
        """Cut a mask by nearest neighbour: exactly resize, crop, then turn; padding is 255."""
        top, left, bottom, right = self._window
        rows = _nearest(mask.height, self.scaled[0])[top:bottom]
        columns = _nearest(mask.width, self.scaled[1])[left:right]
        window = Image.fromarray(np.asarray(mask)[rows][:, columns])
        return self._turn(window, Image.Resampling.NEAREST, IGNORE)

    def places(self, count: int) -> np.ndarray:
        """Say where the crop lies in the picture.

        Returns:
            (count, count, 2) float, of equally spaced places from the crop's first pixel to its
            last: x and y as shares of the picture's width and height, beyond it outside of [0, 1].
        """
        steps = np.linspace(0.5, self.crop - 0.5, count)
        y, x = np.meshgrid(steps, steps, indexing="ij")
        top, left, bottom, right = self._window
        height, width = (self.crop,) * 2 if self.angle else (bottom - top, right - left)
        sides = [width, height] if self.quarters % 2 else [height, width]
        for _ in range(self.quarters):  # undone in reverse: turns, mirrors, rotation
            x, y = sides[0] - y, x
            sides.reverse()
        x = width - x if self.flip else x
        y = height - y if self.vertical else y
        half, (sine, cosine) = self.crop / 2, _sine_cosine(self.angle)
        x, y = x - half, y - half
        across = self.left + half + cosine * x - sine * y
        down = self.top + half + sine * x + cosine * y
        return np.stack([across / self.scaled[1], down / self.scaled[0]], axis=-1)

    @property
    def _window(self) -> tuple[int, int, int, int]:
        """(top, left, bottom, right) of what the scaled image has for the crop."""
        # Corners of a rotated square are beyond it; interpolation looks two pixels further.
        more = math.ceil(self.crop / 2 * (_diagonal(self.angle) - 1)) + 2 if self.angle else 0
        top, left = max(0, self.top - more), max(0, self.left - more)
        bottom = min(self.top + self.crop + more, self.scaled[0])
        right = min(self.left + self.crop + more, self.scaled[1])
        return top, left, bottom, right

    def _turn(self, window: Image.Image, resample: Image.Resampling, fill: int) -> Image.Image:
        """Rotate the window, mirror it, turn it by quarters, and pad it to the crop's size."""
        if self.angle:
            sine, cosine = _sine_cosine(self.angle)
            half, (top, left, *_) = self.crop / 2, self._window
            x = self.left - left + half - (cosine * half - sine * half)
            y = self.top - top + half - (sine * half + cosine * half)
            matrix = (cosine, -sine, x, sine, cosine, y)  # from the crop to the window
            size, affine = (self.crop, self.crop), Image.Transform.AFFINE
            window = window.transform(size, affine, matrix, resample, fillcolor=fill)
        turns = (
            Image.Transpose.FLIP_LEFT_RIGHT if self.flip else None,
            Image.Transpose.FLIP_TOP_BOTTOM if self.vertical else None,
            _QUARTER_TURNS[self.quarters],
        )
        for turn in turns:
            window = window if turn is None else window.transpose(turn)
        border = (0, 0, self.crop - window.width, self.crop - window.height)
        return ImageOps.expand(window, border, fill=fill)  # of none if the window fills it


def _sine_cosine(degrees: float) -> tuple[float, float]:
    return math.sin(math.radians(degrees)), math.cos(math.radians(degrees))


def _diagonal(degrees: float) -> float:
    """Return the sides of the square around a rotated square of side 1: from 1 to 1.41."""
    return sum(map(abs, _sine_cosine(degrees)))


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
    """Draw a weak augmentation: long side to U(scale) x base_size, random crop, mirror, turns.

    ``size`` is the image's (height, width), ``target`` the (row, column) of a pixel of it that the
    window must show. Turns that the settings leave out draw no numbers.
    Source: docs/method.md, sections 5 and 13; aiming replaces unbounded retries.
    """
    crop = augment.crop_size
    long_side = rng.uniform(*augment.scale) * augment.base_size
    scaled = tuple(max(1, round(side * long_side / max(size))) for side in size)
    angle = rng.uniform(-augment.rotate, augment.rotate) if augment.rotate else 0.0
    corner = []
    for axis in (0, 1):
        spare = scaled[axis] - crop
        first, last = 0, max(0, spare)
        if angle and spare < 0:
            first = last = spare // 2  # a small picture rotates in the middle
        if target is not None:
            aim = int((target[axis] + 0.5) * scaled[axis] / size[axis])
            # The window that centres it, and by how much it may be off, to both sides at once.
            middle, reach = aim - (crop - 1) / 2, (crop - 1) / 2 / _diagonal(angle)
            lowest, highest = math.ceil(middle - reach), math.floor(middle + reach)
            first, last = (min(max(end, lowest), highest) for end in (first, last))
        corner.append(int(rng.integers(first, last, endpoint=True)))
    flip = bool(rng.random() < 0.5)
    vertical = augment.vertical and bool(rng.random() < 0.5)
    quarters = int(rng.integers(4)) if augment.quarter_turns else 0
    return CropParams(scaled, corner[0], corner[1], crop, flip, vertical, quarters, angle)


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
