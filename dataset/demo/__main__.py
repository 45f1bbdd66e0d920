"""The embedded demo set: scenes drawn from a seed, in Pascal's folder layout."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from dataset.catalog import KINDS
from dataset.demo.objects import CLASSES
from dataset.demo.scene import draw_scene
from utils.errors import Parser, UserError, exit_with_one_line
from utils.files import writing

VERSION = 1  # of the drawing: raise it when the same seed draws something else
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

    A scene depends on (seed, split, its number) alone, so more images leave the others as they are.
    The first ``labeled`` training scenes are the labeled ones; the rest get no mask file at all.
    ``demo.json``, the settings, says that the folder is the demo's; what it ends with, that all is
    drawn: a killed run is drawn again.

    Args:
        root: Folder to write; made if absent.
        palette: RGB triples of the mask colours, in [0, 255], at most 256 of them.
        train: Number of training images, labeled and unlabeled.
        labeled: Number of training images with a mask, at most ``train``.
        val: Number of validation images.
        seed: Seed of all scenes.
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
        _write_all(root, palette, train, labeled, val, seed, size)
        ours.write_text(text)


def _write_all(
    root: Path,
    palette: bytes,
    train: int,
    labeled: int,
    val: int,
    seed: int,
    size: tuple[int, int],
) -> None:
    """Draw every scene, then write the lists."""

    def write_scenes(split: str, count: int, masks: int) -> list[str]:
        return [
            _write_scene(root, split, i, seed, size, palette if i < masks else None)
            for i in range(count)
        ]

    lines = write_scenes("train", train, labeled)
    lists = {"train": lines, "labeled": lines[:labeled], "unlabeled": lines[labeled:]}
    for name, lines in {**lists, "val": write_scenes("val", val, val)}.items():
        (root / f"{name}.txt").write_text("".join(f"{line}\n" for line in lines))


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


def main() -> None:
    """``python -m dataset.demo ROOT``: draw the demo set."""
    parser = Parser(prog="python -m dataset.demo", description=main.__doc__)
    parser.add_argument("root", type=Path, help="folder to write, such as data/demo")
    parser.add_argument("--seed", type=int, default=0, help="draws other scenes")
    arguments = parser.parse_args()
    if arguments.seed < 0:
        raise UserError(f"--seed: {arguments.seed} is below 0; take a larger one")
    write_demo(arguments.root, KINDS["demo"].palette(), seed=arguments.seed)


if __name__ == "__main__":
    exit_with_one_line(main)
