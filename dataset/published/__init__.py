"""Labeled lists of the literature; README.md tells where they come from."""

from pathlib import Path

from utils.errors import UserError

FOLDER = Path(__file__).parent
# Which files below the root are the training images, and how many there are.
TRAINING = {
    "cityscapes": ("leftImg8bit/train/*/*_leftImg8bit.png", 2_975),
    "coco": ("train2017/*.jpg", 118_287),
}


def published_list(kind: str, split: str, field: str, root: Path) -> tuple[Path, list[str]]:
    """Return the file of a published list, and its lines as ``dataset.lists`` reads them.

    ``split`` names a labeled list, such as '1_16'; ``field`` is 'labeled', 'val', or 'unlabeled'
    for the training images of the kind, below the root, that are not labeled.

    Raises:
        UserError: no such split, or training images are missing below the root.
    """
    names = {path.stem for path in (FOLDER / kind).glob("*.txt")} - {"val", "trainaug"}
    if split not in names:
        raise UserError(
            f"dataset.split: '{split}' is no published list of {kind}; there are "
            f"{', '.join(sorted(names)) or 'none: set split: null'}"
        )
    part = "val" if field == "val" else "train"
    path = FOLDER / kind / f"{'val' if field == 'val' else split}.txt"
    ids = path.read_text().split()
    if field == "unlabeled":
        ids = sorted(_training_ids(kind, root).difference(ids))
    pattern = {"cityscapes": part + "/{1}/{0}", "coco": part + "2017/{0}.jpg masks/{0}.png"}
    return path, [pattern.get(kind, "{0}").format(id_, id_.split("_")[0]) for id_ in ids]


def _training_ids(kind: str, root: Path) -> set[str]:
    if kind == "pascal":
        return set((FOLDER / "pascal/trainaug.txt").read_text().split())
    pattern, count = TRAINING[kind]
    ids = {path.stem.removesuffix("_leftImg8bit") for path in root.glob(pattern)}
    if len(ids) != count:
        raise UserError(
            f"dataset.split: {root} has {len(ids)} training images ({pattern}), {kind} has "
            f"{count}; complete the data, or name labeled, unlabeled and val"
        )
    return ids
