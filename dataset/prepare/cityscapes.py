"""Cityscapes: fine masks of label ids turned into train ids."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from torchvision.datasets import Cityscapes

from dataset.catalog import KINDS
from dataset.prepare.archives import Archive, provide
from dataset.prepare.work import Step, complete
from dataset.reading import read_mask
from utils import IGNORE
from utils.panels import save_mask

COUNTS = {"train": 2_975, "val": 500}
ARCHIVES = tuple(
    Archive(
        f"{folder}_trainvaltest.zip",
        folder,
        folder,
        f"https://www.cityscapes-dataset.com/file-handling/?packageID={package}",
        login=True,
    )
    for folder, package in (("leftImg8bit", 3), ("gtFine", 1))
)


def _train_ids() -> np.ndarray:
    """(256,) uint8, the train id of each label id; classes that are not evaluated are ignored."""
    table = np.full(256, IGNORE, np.uint8)
    for label in Cityscapes.classes:
        if label.id >= 0:  # a licence plate has -1, which no 8-bit mask holds
            table[label.id] = label.train_id
    return table


TRAIN_IDS = _train_ids()


def prepare_cityscapes(
    root: Path, download: bool, workers: int, counts: Mapping[str, int] = COUNTS
) -> None:
    """Write ``*_gtFine_labelTrainIds.png`` beside the label ids, ``train.txt`` and ``val.txt``.

    ``download`` fetches nothing: Cityscapes requires a login.
    """
    provide(root, ARCHIVES, download)
    images = {
        split: [
            file.relative_to(root).as_posix()
            for file in sorted((root / "leftImg8bit" / split).glob("*/*_leftImg8bit.png"))
        ]
        for split in counts
    }

    def mask(image: str, ids: str) -> str:
        stem = image.removeprefix("leftImg8bit").removesuffix("_leftImg8bit.png")
        return f"gtFine{stem}_gtFine_{ids}.png"

    sources = {
        root / mask(image, "labelTrainIds"): root / mask(image, "labelIds")
        for names in images.values()
        for image in names
    }
    lists = {
        split: [f"{image} {mask(image, 'labelTrainIds')}" for image in names]
        for split, names in images.items()
    }
    complete(root, lists, counts, [Step("train ids", write_train_ids, sources)], workers)


def write_train_ids(source: Path, path: Path) -> None:
    """Write a mask of label ids as a palette PNG of train ids."""
    ids = TRAIN_IDS[np.asarray(read_mask(source))]
    save_mask(path, ids, KINDS["cityscapes"].palette())
