"""Pascal VOC 2012 with the masks of SBD, the set that papers call trainaug, in one folder."""

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import numpy as np
from torchvision.datasets import SBDataset
from torchvision.datasets.voc import DATASET_YEAR_DICT

from dataset.catalog import KINDS
from dataset.prepare.archives import Archive, provide
from dataset.prepare.work import Step, complete, copy_file, import_extra, read_words
from utils.errors import UserError
from utils.panels import save_mask

KIND = KINDS["pascal"]  # VOC's own layout
COUNTS = {"train": 10_582, "val": 1_449}
_VOC12 = DATASET_YEAR_DICT["2012"]
_VOC_FOLDER, _SBD_FOLDER = "VOCdevkit/VOC2012", "benchmark_RELEASE"
ARCHIVES = (
    Archive(_VOC12["filename"], _VOC_FOLDER, _VOC_FOLDER, _VOC12["url"], _VOC12["md5"], "md5"),
    Archive(SBDataset.filename, _SBD_FOLDER, _SBD_FOLDER, SBDataset.url, SBDataset.md5, "md5"),
)


def prepare_pascal(
    root: Path, download: bool, workers: int, counts: Mapping[str, int] = COUNTS
) -> None:
    """Write ``JPEGImages``, ``SegmentationClass``, ``train.txt`` and ``val.txt``.

    train.txt is trainaug: VOC's train, SBD's train and SBD's val, without VOC's val. Masks are
    VOC's own, with void borders, where VOC has one; SBD's, without void, for the others. The
    archives have 3.4 GB.
    """
    _scipy_io()
    provide(root, ARCHIVES, download)
    voc, sbd = root / _VOC_FOLDER, root / _SBD_FOLDER / "dataset"
    voc_train, val = (
        set(read_words(voc / f"ImageSets/Segmentation/{split}.txt")) for split in ("train", "val")
    )
    train = voc_train.union(*(read_words(sbd / f"{split}.txt") for split in ("train", "val"))) - val
    image, mask = KIND.image_pattern.format, KIND.mask_pattern.format
    steps = (
        Step("images", copy_file, {root / image(name): voc / image(name) for name in train | val}),
        Step(
            "VOC masks",
            copy_file,
            {root / mask(name): voc / mask(name) for name in voc_train | val},
        ),
        Step(
            "SBD masks",
            write_sbd_mask,
            {root / mask(name): sbd / f"cls/{name}.mat" for name in train - voc_train},
        ),
    )
    lists = {
        split: [f"{image(name)} {mask(name)}" for name in sorted(names)]
        for split, names in (("train", train), ("val", val))
    }
    complete(root, lists, counts, steps, workers)


def write_sbd_mask(source: Path, path: Path) -> None:
    """Write the class mask of an SBD ``.mat`` file as a palette PNG."""
    loadmat = _scipy_io().loadmat
    try:
        found = loadmat(source, variable_names=["GTcls"])
        ids = np.asarray(found["GTcls"][0]["Segmentation"][0], np.uint8)
    except Exception as error:  # scipy raises many kinds
        raise UserError(
            f"{source}: cannot read SBD's mask in it ({error}); unpack benchmark.tgz again"
        ) from error
    save_mask(path, ids, KIND.palette())


def _scipy_io() -> ModuleType:
    return import_extra("scipy.io", "scipy", "it reads SBD's .mat files")
