"""Writes the demo set: scenes drawn from a seed, in Pascal's folder layout."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from dataset.demo.objects import CLASSES
from dataset.demo.scene import draw_scene
from utils.errors import UserError
from utils.files import write_atomically, write_text, writing
from utils.panels import encode, in_colour

VERSION = 3  # of the drawing: raise it when a seed draws something else
_DRAWING = b"{}\n"  # demo.json until all is drawn


class Scenes(NamedTuple):
    """Which scenes are drawn."""

    train: int = 120  # training images, of which ``labeled`` have a mask
    labeled: int = 12
    val: int = 60  # validation images
    test: int = 120  # test images, which nothing was tuned on
    seed: int = 0  # of all scenes
    size: tuple[int, int] = (96, 128)  # (height, width) in pixels


_DEMO = Scenes()


def write_demo(root: Path, palette: bytes, scenes: Scenes = _DEMO) -> None:
    """Draw the demo data set in Pascal's folder layout, unless ``root`` holds it already.

    A scene depends on (seed, split, its number) alone. The first ``labeled`` training scenes have
    mask files; those of the others are in ``Truth``, listed in ``truth.txt``, for ``eval.py
    --diagnose`` alone. ``demo.json`` marks the folder as the demo's; it holds the settings when
    all is drawn, so that a killed run goes on. No other file that is there is changed.

    Args:
        root: the folder.
        palette: 768 bytes, of the masks.
        scenes: their numbers, size and seed.

    Raises:
        UserError: the folder holds something else, or is not to be written to.
    """
    settings = {"version": VERSION, **scenes._asdict()}
    ours, text = root / "demo.json", json.dumps(settings) + "\n"
    with writing(root):
        root.mkdir(parents=True, exist_ok=True)
        others = [x for x in root.iterdir() if x.name != f".{ours.name}.partial"]  # of a kill
        there = ours.read_bytes() if ours.is_file() else _DRAWING * (not others)
    if there == text.encode():
        return
    if there != _DRAWING:
        raise UserError(
            f"{root}: another data set, or another drawing, is in this folder; name an empty one"
        )
    _add(ours, _DRAWING)
    lines: dict[str, list[str]] = {"train": [], "val": [], "test": [], "truth": []}  # by list
    train, labeled, val, test = scenes[:4]
    parts = ((0, "train", train, labeled), (1, "val", val, val), (2, "test", test, test))
    for part, split, count, masks in parts:
        for number in range(count):
            rng = np.random.default_rng([scenes.seed, part, number])
            image, ids = draw_scene(rng, scenes.size, first=1 + number % (len(CLASSES) - 1))
            name, masked = f"{part}{number:03d}", number < masks
            photo = f"JPEGImages/{name}.jpg"
            mask = f"{'SegmentationClass' if masked else 'Truth'}/{name}.png"
            _add(root / photo, encode(Image.fromarray(image), "JPEG", quality=92))
            _add(root / mask, encode(in_colour(ids, palette)))
            lines[split].append(f"{photo} {mask}" if masked else photo)
            lines["truth"] += [] if masked else [f"{photo} {mask}"]
    lines |= {"labeled": lines["train"][:labeled], "unlabeled": lines["train"][labeled:]}
    for name, listed in lines.items():
        _add(root / f"{name}.txt", "".join(f"{line}\n" for line in listed).encode())
    write_text(ours, text)


def _add(path: Path, content: bytes) -> None:
    """Write a file that is not there yet."""
    with writing(path):
        if path.exists() and path.read_bytes() != content:
            raise UserError(f"{path}: is there with other content; name an empty folder")
    if not path.exists():
        write_atomically(path, lambda partial: partial.write_bytes(content))
