"""Labeled lists of the literature; README.md tells where they come from."""

from collections.abc import Sequence
from pathlib import Path

from utils.errors import UserError

FOLDER = Path(__file__).parent
# Which files below the root are the training images, and how many there are.
TRAINING = {
    "cityscapes": ("leftImg8bit/train/*/*_leftImg8bit.png", 2_975),
    "coco": ("train2017/*.jpg", 118_287),
}


def published_list(kind: str, split: str, field: str, root: Path) -> tuple[Path, list[str]]:
    """Return one list of a published split.

    Args:
        kind: of the data set.
        split: name of a labeled list, such as '1_16'.
        field: 'labeled', 'val', or 'unlabeled' for the training images that are not labeled.
        root: folder of the data set.

    Returns:
        The file of the list, and its lines as ``dataset.lists`` reads them.

    Raises:
        UserError: no such split, or training images are missing below the root.
    """
    names = {path.stem for path in (FOLDER / kind).glob("*.txt")} - {"val", "trainaug"}
    if not names:
        raise UserError(
            f"dataset.split: kind '{kind}' has no published lists; set split: null and name "
            "labeled, unlabeled and val"
        )
    if split not in names:
        raise UserError(
            f"dataset.split: '{split}' is no published list of {kind}; there are "
            f"{', '.join(sorted(names))}"
        )
    path = FOLDER / kind / f"{'val' if field == 'val' else split}.txt"
    ids = path.read_text().split()
    if field == "unlabeled":
        labeled = set(ids)
        ids = [each for each in _training_ids(kind, root) if each not in labeled]
    return path, [_line(kind, "val" if field == "val" else "train", each) for each in ids]


def _training_ids(kind: str, root: Path) -> Sequence[str]:
    if kind == "pascal":
        return (FOLDER / "pascal/trainaug.txt").read_text().split()
    pattern, count = TRAINING[kind]
    ids = sorted(path.stem.removesuffix("_leftImg8bit") for path in root.glob(pattern))
    if len(ids) != count:
        raise UserError(
            f"dataset.split: {root} has {len(ids)} training images ({pattern}), {kind} has "
            f"{count}; complete the data, or name labeled, unlabeled and val"
        )
    return ids


def _line(kind: str, part: str, id_: str) -> str:
    if kind == "cityscapes":
        return f"{part}/{id_.split('_')[0]}/{id_}"
    return f"{part}2017/{id_}.jpg masks/{id_}.png" if kind == "coco" else id_
