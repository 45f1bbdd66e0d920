"""Writes the demo set: scenes drawn from a seed, in Pascal's folder layout."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from dataset.demo.objects import CLASSES
from dataset.demo.scene import draw_scene
from utils.errors import UserError
from utils.files import writing
from utils.panels import in_colour

VERSION = 1  # of the drawing: raise it when a seed draws something else


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

    ``train``, ``labeled`` and ``val`` count images, ``size`` is (height, width) in pixels and
    ``palette`` 768 bytes. A ``UserError`` if ``root`` holds something else or is not to be written.
    """
    settings = {"train": train, "labeled": labeled, "val": val, "seed": seed, "size": list(size)}
    ours, text = root / "demo.json", json.dumps({"version": VERSION, **settings}) + "\n"
    if ours.is_file() and ours.read_text() == text:
        return
    if not ours.is_file() and root.is_dir() and any(root.iterdir()):
        raise UserError(f"{root}: another data set is in this folder; name an empty one")
    lists: dict[str, list[str]] = {}
    with writing(root):
        root.mkdir(parents=True, exist_ok=True)
        ours.write_text("{}\n")
        for folder in ("JPEGImages", "SegmentationClass"):
            (root / folder).mkdir(exist_ok=True)
        for part, split, count, masks in ((0, "train", train, labeled), (1, "val", val, val)):
            lists[split] = []
            for number in range(count):
                rng = np.random.default_rng([seed, part, number])
                image, ids = draw_scene(rng, size, first=1 + number % (len(CLASSES) - 1))
                line = f"JPEGImages/{part}{number:03d}.jpg"
                Image.fromarray(image).save(root / line, quality=92)
                if number < masks:
                    mask = f"SegmentationClass/{part}{number:03d}.png"
                    in_colour(ids, palette).save(root / mask)
                    line = f"{line} {mask}"
                lists[split].append(line)
        lists |= {"labeled": lists["train"][:labeled], "unlabeled": lists["train"][labeled:]}
        for name, lines in lists.items():
            (root / f"{name}.txt").write_text("".join(f"{line}\n" for line in lines))
        ours.write_text(text)
