"""A demo scene: a cluttered background, objects that hide one another, light, a camera.

Pairs of classes differ in hue, and light varies; within a pair shape, texture and shading decide.
Crate and bricks are boxes, leaf and fish pointed ovals: the likely mistakes.
"""

import colorsys
import math

import numpy as np
from PIL import Image, ImageFilter

from dataset.demo.objects import CLASSES, OBJECTS, Array, Light
from utils import IGNORE

SUPERSAMPLE = 2
HUE_SPREAD = 0.06  # standard deviation about a class's hue, in turns of the colour circle


def _colour(
    rng: np.random.Generator, hue: float, spread: float, saturations: tuple[float, float]
) -> Array:
    """An RGB colour, (3, 1, 1) in [0, 1], whose hue is close to the given one."""
    saturation, value = rng.uniform(*saturations), rng.uniform(0.4, 0.95)
    rgb = colorsys.hsv_to_rgb((hue + spread * rng.normal()) % 1, saturation, value)
    return np.array(rgb, dtype=np.float32).reshape(3, 1, 1)


def _noise(rng: np.random.Generator, shape: tuple[int, int], cells: int) -> Array:
    """Smooth (H, W) noise, about [-1, 1], with so many cells from top to bottom."""
    coarse = rng.uniform(-1, 1, (cells + 1, cells * shape[1] // shape[0] + 1)).astype(np.float32)
    return np.asarray(Image.fromarray(coarse).resize(shape[::-1], Image.Resampling.BICUBIC))


def _background(rng: np.random.Generator, x: Array, y: Array) -> Array:
    """A (3, H, W) gradient under noise, with soft blobs, striped patches and lines on it."""
    angle = rng.uniform(0, 2 * math.pi)
    ramp = 0.5 + 0.5 * (math.cos(angle) * x + math.sin(angle) * y)
    near, far = (_colour(rng, rng.random(), 0, (0.0, 0.25)) for _ in range(2))
    canvas = near * ramp + far * (1 - ramp)
    for cells, strength in ((4, 0.2), (14, 0.2), (40, 0.25)):
        canvas *= 1 + rng.uniform(0.05, strength) * _noise(rng, x.shape, cells)
    for _ in range(int(rng.integers(5, 10))):
        angle, reach = rng.uniform(0, math.pi), rng.uniform(0.1, 0.35)
        px, py = x - rng.uniform(-0.6, 0.6), y - rng.uniform(-0.5, 0.5)
        cos, sin = math.cos(angle), math.sin(angle)
        a, b = cos * px + sin * py, cos * py - sin * px
        what = rng.integers(3)
        if what == 0:
            cover = np.abs(b + 0.3 * reach * np.sin(6 * a)) < rng.uniform(0.004, 0.02)
        else:
            cover = np.clip(3 - 3 * np.hypot(a, b * 1.6) / reach + _noise(rng, x.shape, 8), 0, 1)
        if what == 2:
            cover = cover * (np.sin(rng.uniform(30, 90) * a) > 0)
        alpha = rng.uniform(0.3, 0.9) * cover.astype(np.float32)
        canvas += alpha * (_colour(rng, rng.random(), 0, (0.0, 0.6)) - canvas)
    return canvas


Placed = tuple[int, float, float, float]  # class id; x, y and radius in image heights


def _arrange(rng: np.random.Generator, aspect: float, first: int) -> list[Placed]:
    """Choose 3 to 6 objects of 2 to 4 classes, ``first`` among them, and spread them out."""
    others = [i for i in range(1, len(CLASSES)) if i != first]
    classes = [first, *rng.permutation(others)[: rng.integers(1, 4)].tolist()]
    count = max(int(rng.integers(3, 7)), len(classes))
    classes += rng.choice(classes, count - len(classes)).tolist()
    share = rng.uniform(0.5, 0.7) * aspect / count
    placed: list[Placed] = []
    for class_id in classes:
        radius = min(math.sqrt(share * rng.uniform(0.7, 1.3) / math.pi), 0.25)
        spots = rng.uniform(-0.5, 0.5, (12, 2)) * (aspect - radius, 1 - radius)
        room = [min([math.dist(s, p[1:3]) for p in placed], default=0) for s in spots]
        x, y = spots[int(np.argmax(room))].tolist()
        placed.append((class_id, x, y, radius))
    return [placed[i] for i in rng.permutation(count)]


def _paint(
    canvas: Array, x: Array, y: Array, placed: Placed, light: Light, rng: np.random.Generator
) -> Array:
    """Paint an object and the shadow it casts onto ``canvas``; return its (H, W) mask."""
    class_id, middle_x, middle_y, radius = placed
    kind = OBJECTS[CLASSES[class_id]]
    angle, mirror = rng.uniform(-kind.tilt, kind.tilt), rng.choice((-1.0, 1.0)).item()
    cos, sin, scale = math.cos(angle), math.sin(angle), radius * kind.stretch

    def own_frame(a: Array | float, b: Array | float) -> tuple[Array | float, Array | float]:
        return mirror * (cos * a + sin * b), cos * b - sin * a

    u, v = own_frame((x - middle_x) / scale, (y - middle_y) / scale)
    mask, tone, shade = kind.draw(u, v, own_frame(*light), rng)
    first, other = (_colour(rng, kind.hue, HUE_SPREAD, (0.3, 0.85)) for _ in range(2))
    second = np.clip(0.6 * first * rng.uniform(0.4, 1.5) + 0.4 * other, 0, 1)
    wear = 1 + rng.uniform(0.03, 0.2) * _noise(rng, x.shape, 24)
    blurred = Image.fromarray(mask).convert("L").filter(ImageFilter.GaussianBlur(len(x) / 50))
    shift = (1, 0, 0.05 * len(x) * light[0], 0, 1, 0.05 * len(x) * light[1])
    shadow = blurred.transform(blurred.size, Image.Transform.AFFINE, shift)
    canvas *= 1 - 0.5 / 255 * np.asarray(shadow, np.float32)
    paint = first[:, 0] + tone[mask] * (second - first)[:, 0]
    canvas[:, mask] = paint * (shade * wear)[mask]
    return mask


def draw_scene(
    rng: np.random.Generator, size: tuple[int, int] = (96, 128), first: int | None = None
) -> tuple[Array, Array]:
    """Draw one scene: 3 to 6 objects of 2 to 4 classes before a cluttered background.

    ``rng`` decides everything; ``size`` is (height, width) in pixels, ``first`` a class id
    in [1, 6] that must be among the objects (None draws one).

    Returns:
        The image, (H, W, 3) uint8, and its class ids, (H, W) uint8: an index into ``CLASSES``, or
        255 on the line one pixel wide that runs along the outline of about half of the objects.
    """
    height, width = (SUPERSAMPLE * side for side in size)
    x, y = np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32))
    x, y = (x + 0.5 - width / 2) / height, (y + 0.5 - height / 2) / height
    angle = rng.uniform(-0.9, -0.1) * math.pi  # the light comes from above
    light = math.cos(angle), math.sin(angle)
    canvas = _background(rng, x, y)
    owner = np.zeros((height, width), np.uint8)  # 0 or the number of the object seen
    objects = _arrange(rng, width / height, first or int(rng.integers(1, len(CLASSES))))
    for number, placed in enumerate(objects, start=1):
        owner[_paint(canvas, x, y, placed, light, rng)] = number
    canvas *= 1 + 0.25 * (light[0] * x + light[1] * y)
    canvas *= rng.uniform(0.75, 1.1) * rng.uniform(0.85, 1.15, (3, 1, 1)).astype(np.float32)

    owner = owner[::SUPERSAMPLE, ::SUPERSAMPLE]
    ids = np.array([0, *(class_id for class_id, *_ in objects)], np.uint8)[owner]
    lined = np.array([False, *(rng.random(len(objects)) < 0.5)])[owner]
    ids[_outline(owner) & lined] = IGNORE
    return _photograph(canvas, rng), ids


def _outline(owner: Array) -> Array:
    """The (H, W) pixels that touch a pixel that belongs to another object."""
    padded = np.pad(owner, 1, mode="edge")
    neighbours = padded[1:-1, 2:], padded[1:-1, :-2], padded[2:, 1:-1], padded[:-2, 1:-1]
    return np.any([owner != neighbour for neighbour in neighbours], axis=0)


def _photograph(canvas: Array, rng: np.random.Generator) -> Array:
    """Shrink (3, H, W) light to an (H, W, 3) image: averaged, defocused, with sensor noise."""
    height, width = (side // SUPERSAMPLE for side in canvas.shape[1:])
    light = canvas.reshape(3, height, SUPERSAMPLE, width, SUPERSAMPLE).mean(axis=(2, 4))
    sharp = Image.fromarray((255 * np.clip(light, 0, 1)).astype(np.uint8).transpose(1, 2, 0))
    seen = np.asarray(sharp.filter(ImageFilter.GaussianBlur(rng.uniform(0.2, 0.7))), np.float32)
    noise = rng.uniform(2, 8) * rng.standard_normal(seen.shape, dtype=np.float32)
    return np.clip(seen + noise, 0, 255).astype(np.uint8)
