"""The objects of the demo images: shapes with texture and shading, each in its own frame."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

Array = np.ndarray
Light = tuple[float, float]  # unit vector towards the light, in the object's own frame


class Surface(NamedTuple):
    """What an object looks like, before it is given colours."""

    mask: Array  # (H, W) bool
    tone: Array  # (H, W) in [0, 1], from the object's first colour to its second
    shade: Array  # (H, W) brightness, about 1


class ObjectKind(NamedTuple):
    """A class of objects; in its own frame, u right and v down, one fills about [-1, 1]."""

    draw: Callable[[Array, Array, Light, np.random.Generator], Surface]
    hue: float  # the middle of a wide range
    stretch: float  # evens out the areas of slim and stout classes
    tilt: float  # largest rotation in radians


def _ball(u: Array, v: Array, light: Light, rng: np.random.Generator) -> Surface:
    """A sphere with coloured gores or a band, and a highlight."""
    mask = u * u + v * v < 1
    w = np.sqrt(np.maximum(1 - u * u - v * v, 0))
    axes = np.linalg.qr(rng.normal(size=(3, 3)))[0].astype(np.float32)
    x, y, z = (axis[0] * u + axis[1] * v + axis[2] * w for axis in axes)
    gores = np.sin(int(rng.integers(2, 5)) * np.arctan2(y, x)) > 0
    tone = gores if rng.random() < 0.65 else np.abs(z) < rng.uniform(0.2, 0.45)
    facing = np.maximum(0.65 * (light[0] * u + light[1] * v) + 0.75 * w, 0)
    return Surface(mask, tone, 0.35 + 0.75 * facing + 0.8 * facing**24)


def _box(u: Array, v: Array, light: Light, rng: np.random.Generator) -> tuple[Array, ...]:
    """Three faces of a box: mask, coordinates on the face in [-1, 1] (two arrays), brightness."""
    width, height = rng.uniform(0.7, 0.95), rng.uniform(0.6, 0.85)
    right, up = rng.uniform(0.2, 0.5), rng.uniform(0.2, 0.45)
    u, v = u + right / 2, v - up / 2
    side, top = (u - width) / right, (-v - height) / up  # how far back on that face
    depth = np.maximum(np.maximum(side, top), 0)
    a, b = (u - depth * right) / width, (v + depth * up) / height
    mask = (depth <= 1) & (np.abs(a) < 1.001) & (np.abs(b) < 1.001)
    on_side, on_top = (side > 0) & (side >= top), (top > 0) & (top > side)
    shade = np.where(on_side, 0.7 + 0.3 * light[0], np.where(on_top, 1 - 0.3 * light[1], 0.9))
    return mask, np.where(on_side, 2 * depth - 1, a), np.where(on_top, 2 * depth - 1, b), shade


def _crate(u: Array, v: Array, light: Light, rng: np.random.Generator) -> Surface:
    """A wooden box: grained planks, a frame and a brace."""
    mask, a, b, shade = _box(u, v, light, rng)
    count = int(rng.integers(3, 6))
    row = (b + 1) / 2 * count
    plank = np.clip(row, 0, count - 1).astype(int)
    phase = rng.uniform(0, 9, count).astype(np.float32)[plank]
    grain = 0.5 + 0.5 * np.sin(rng.uniform(9, 16) * b + 2 * np.sin(3 * a + phase) + phase)
    rim = np.maximum(np.abs(a), np.abs(b))
    brace = np.abs(a - b)
    beam = (rim > 0.74) | (brace < 0.22)
    gap = ~beam & (np.abs(row - np.round(row)) < 0.09)
    line = (np.abs(rim - 0.74) < 0.05) | ((np.abs(brace - 0.22) < 0.05) & (rim < 0.74))
    tone = np.where(beam, 0.15, 0.35 + 0.45 * grain)
    return Surface(mask, tone, shade * np.where(gap | line, 0.5, 1))


def _bricks(u: Array, v: Array, light: Light, rng: np.random.Generator) -> Surface:
    """A block of masonry: courses of bricks, each of its own tone, with joints between."""
    mask, a, b, shade = _box(u, v, light, rng)
    row = (b + 1) / 2 * int(rng.integers(4, 7))
    column = (a + 1) * rng.uniform(1.1, 1.8) + 0.5 * (np.floor(row) % 2)
    joint = (row % 1 < 0.2) | (column % 1 < 0.1)
    baked = (np.sin(12.9 * np.floor(row) + 78.2 * np.floor(column)) * 43.7) % 1
    return Surface(mask, np.where(joint, 1, 0.4 * baked), shade * np.where(joint, 0.95, 0.9))


def _leaf(u: Array, v: Array, light: Light, rng: np.random.Generator) -> Surface:
    """A pointed, toothed blade with a stem, a midrib and side veins."""
    v = v - rng.uniform(-0.15, 0.15) * (1 - u * u)
    along = np.clip((u + 0.8) / 1.8, 0, 1)
    teeth = 1 + 0.1 * np.abs(np.sin(rng.uniform(8, 14) * u))
    blade = np.abs(v) < rng.uniform(1.15, 1.5) * along**0.7 * (1 - along) * teeth
    stem = (np.abs(u + 0.9) < 0.25) & (np.abs(v) < 0.05)
    veins = (rng.uniform(4, 6.5) * (u - 0.7 * np.abs(v))) % 1 < 0.22
    rib = (np.abs(v) < 0.045) | (veins & (np.abs(v) < 0.4))
    fold = np.where(v < 0, 1, 0.72) if light[1] < 0 else np.where(v < 0, 0.72, 1)
    return Surface(blade | stem, np.where(rib, 0.9, 0.1 + 0.3 * np.abs(v)), fold)


def _fish(u: Array, v: Array, light: Light, rng: np.random.Generator) -> Surface:
    """A scaly oval body with a forked tail, a back fin and an eye."""
    deep = rng.uniform(0.4, 0.55)
    oval = ((u - 0.2) / 0.8) ** 2 + (v / deep) ** 2
    behind = np.clip(-u - 0.4, 0, 1)
    tail = (np.abs(v) < 0.08 + 0.9 * behind) & (u < -0.4) & (u > -1 + 0.3 * (0.5 - np.abs(v)))
    fin = (v < 0) & (v > -deep - 0.22 * np.clip(u + 0.3, 0, 1)) & (np.abs(u - 0.1) < 0.38)
    pitch = rng.uniform(14, 22)
    scales = (np.sin(pitch * u) * np.sin(pitch * v) > 0) & (u < 0.5)
    bars = np.sin(rng.uniform(7, 11) * u) > 0.3 if rng.random() < 0.4 else scales
    tone = np.where(oval < 1, 0.55 * bars + 0.1, 0.75 + 0.2 * np.sin(30 * v))
    gill = (np.abs(np.hypot(u - 0.85, v) - 0.38) < 0.035) & (oval < 1)
    eye = np.hypot(u - 0.72, v + 0.1)
    round_off = 1.1 - 0.45 * np.minimum(oval, 1) + 0.3 * (light[0] * u + light[1] * v)
    shade = np.where(gill | (eye < 0.07), 0.3, np.where(eye < 0.13, 1.6, round_off))
    return Surface((oval < 1) | tail | fin, tone, shade)


def _mug(u: Array, v: Array, light: Light, rng: np.random.Generator) -> Surface:
    """A cylinder seen from a little above, open at the top, with a handle."""
    half, tall, lip = rng.uniform(0.55, 0.68), rng.uniform(0.7, 0.9), rng.uniform(0.12, 0.22)
    u = u + 0.2
    across = np.clip(u / half, -1, 1)
    bow = lip * np.sqrt(1 - across**2)
    body = (np.abs(u) < half) & (v > -tall - bow) & (v < tall + bow)
    inside = (u / half) ** 2 + ((v + tall) / lip) ** 2 < 0.8
    ring = np.hypot((u - half) / 0.5, v / (0.62 * tall))
    handle = (ring > 0.55) & (ring < 1) & (u > 0) & ~body
    height = v - bow
    pattern = np.sin(rng.uniform(3, 9) * height + rng.uniform(0, 6))
    if rng.random() < 0.4:
        pattern = pattern * np.sin(rng.uniform(4, 6) * np.arcsin(across))
    turned = 0.6 + 0.4 * np.sqrt(1 - across**2) + 0.35 * light[0] * across
    shade = np.where(inside, 0.4 - 0.2 * light[0] * across, np.where(body, turned, 0.8))
    return Surface(body | handle, (pattern > 0.3) & body & ~inside, shade)


OBJECTS = {
    "ball": ObjectKind(_ball, hue=0.62, stretch=1.0, tilt=3.1),
    "crate": ObjectKind(_crate, hue=0.1, stretch=1.05, tilt=0.4),
    "bricks": ObjectKind(_bricks, hue=0.03, stretch=1.05, tilt=0.4),
    "leaf": ObjectKind(_leaf, hue=0.32, stretch=1.6, tilt=3.1),
    "fish": ObjectKind(_fish, hue=0.45, stretch=1.5, tilt=0.8),
    "mug": ObjectKind(_mug, hue=0.75, stretch=1.15, tilt=0.35),
}
CLASSES: tuple[str, ...] = ("background", *OBJECTS)
