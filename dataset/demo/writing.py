"""Writes the demo set: scenes drawn from a seed, in Pascal's folder layout."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from dataset.demo.objects import CLASSES
from dataset.demo.scene import draw_scene
from utils.errors import UserError
from utils.files import writing

VERSION = 1  # of the drawing: raise it when a seed draws something else
SPLIT_IDS = {"train": 0, "val": 1}


def write_demo(
    root: Path,
    palette: bytes,
    train: int = 120,
    labeled: int = 12,
    val: int = 60,
    seed: int = 0,
    size: tuple[int, int] = (96, 128),
) -> None:
    """Draw the demo data set in Pascal's folder layout, unless ``root`` holds it already.

    A scene depends on (seed, split, its number) alone. Only the first ``labeled`` training scenes
    have mask files. ``demo.json`` marks the folder as the demo's; it holds the settings when all is
    drawn, so that a killed run is drawn again.

    Args:
        root: the folder.
        palette: of the masks.
        train: number of training images, labeled and unlabeled.
        labeled: number of training images with a mask.
        val: number of validation images.
        seed: of all scenes.
        size: (height, width) in pixels.

    Raises:
        UserError: ``root`` holds another data set, or is not to be written to.
    """
    settings = {"train": train, "labeled": labeled, "val": val, "seed": seed, "size": list(size)}
    ours, text = root / "demo.json", json.dumps({"version": VERSION, **settings}) + "\n"
    if ours.is_file() and ours.read_text() == text:
        return
    lists = [root / f"{name}.txt" for name in ("train", "val", "labeled", "unlabeled")]
    others = [path for path in (*lists, root / "JPEGImages") if path.exists()]
    if others and not ours.is_file():
        raise UserError(f"{others[0]}: another data set is in this folder; name an empty one")
    with writing(root):
        root.mkdir(parents=True, exist_ok=True)
        ours.write_text("{}\n")
        for name in ("JPEGImages", "SegmentationClass"):
            (root / name).mkdir(exist_ok=True)
        for path in lists:
            path.unlink(missing_ok=True)
        for split, count, masks in (("train", train, labeled), ("val", val, val)):
            lines = [
                _write_scene(root, split, number, seed, size, palette if number < masks else None)
                for number in range(count)
            ]
            named = {split: lines}
            if split == "train":
                named |= {"labeled": lines[:labeled], "unlabeled": lines[labeled:]}
            for name, chosen in named.items():
                (root / f"{name}.txt").write_text("".join(f"{line}\n" for line in chosen))
        ours.write_text(text)


def _write_scene(
    root: Path, split: str, number: int, seed: int, size: tuple[int, int], palette: bytes | None
) -> str:
    """Write an image and, given a palette, its mask; return their line of a list."""
    split_id = SPLIT_IDS[split]
    rng = np.random.default_rng([seed, split_id, number])
    image, ids = draw_scene(rng, size, first=1 + number % (len(CLASSES) - 1))
    image_name = f"JPEGImages/{split_id}{number:03d}.jpg"
    mask_name = f"SegmentationClass/{split_id}{number:03d}.png"
    Image.fromarray(image).save(root / image_name, quality=92)
    if palette is None:
        (root / mask_name).unlink(missing_ok=True)
        return image_name
    mask = Image.fromarray(ids)
    mask.putpalette(palette)
    mask.save(root / mask_name)
    return f"{image_name} {mask_name}"
