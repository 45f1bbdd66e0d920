"""Cityscapes: fine masks of label ids turned into train ids."""

from pathlib import Path

import numpy as np
from torchvision.datasets import Cityscapes

from dataset.catalog import KINDS
from dataset.prepare.archives import Archive
from dataset.prepare.work import DataSet, Step
from dataset.reading import read_ids
from utils import IGNORE
from utils.panels import save_mask

COUNTS = {"train": 2_975, "val": 500}
_PAGE = "https://www.cityscapes-dataset.com/file-handling/?packageID="
ARCHIVES = [
    Archive(
        f"{folder}_trainvaltest.zip", folder, folder, f"{_PAGE}{package}", login=True, most=most
    )
    for folder, package, most in (("leftImg8bit", 3, 24), ("gtFine", 1, 4))
]
_MEANING = {label.id: label.train_id for label in Cityscapes.classes}
TRAIN_IDS = np.array([_MEANING.get(id_, IGNORE) for id_ in range(256)], np.uint8)  # by label id


def _plan(root: Path) -> tuple[dict[str, list[str]], list[Step]]:
    """``*_gtFine_labelTrainIds.png`` beside the label ids, ``train.txt`` and ``val.txt``."""
    pattern, sources, lists = KINDS["cityscapes"].mask_pattern, {}, {}
    for split in COUNTS:
        images = sorted((root / "leftImg8bit" / split).glob("*/*_leftImg8bit.png"))
        ids = [f"{split}/{x.parent.name}/{x.name.removesuffix('_leftImg8bit.png')}" for x in images]
        lists[split] = [" ".join(KINDS["cityscapes"].files_of(id_)) for id_ in ids]
        for id_ in ids:
            mask = pattern.format(id_)
            sources[root / mask] = root / mask.replace("_labelTrainIds", "_labelIds")
    return lists, [Step("train ids", _write_train_ids, sources)]


def _write_train_ids(source: Path, path: Path) -> None:
    save_mask(path, TRAIN_IDS[read_ids(source)], KINDS["cityscapes"].palette())


CITYSCAPES = DataSet("train ids from label ids", ARCHIVES, COUNTS, _plan)
