"""Pascal VOC 2012 with the masks of SBD, the set that papers call trainaug, in one folder."""

import shutil
from pathlib import Path

import numpy as np
from torchvision.datasets import SBDataset
from torchvision.datasets.voc import DATASET_YEAR_DICT

from dataset.catalog import KINDS
from dataset.prepare.archives import Archive
from dataset.prepare.work import DataSet, Step, read_words
from utils.errors import UserError
from utils.files import write_atomically
from utils.panels import save_mask

KIND = KINDS["pascal"]  # VOC's own layout
COUNTS = {"train": 10_582, "val": 1_449}
_VOC12 = DATASET_YEAR_DICT["2012"]
_VOC, _SBD = "VOCdevkit/VOC2012", "benchmark_RELEASE"
ARCHIVES = [
    Archive(_VOC12["filename"], _VOC, _VOC, _VOC12["url"], _VOC12["md5"], "md5"),
    Archive(SBDataset.filename, _SBD, _SBD, SBDataset.url, SBDataset.md5, "md5"),
]


def _plan(root: Path) -> tuple[dict[str, list[str]], list[Step]]:
    """``JPEGImages``, ``SegmentationClass``, ``train.txt`` and ``val.txt``.

    train.txt is trainaug: VOC's train, SBD's train and SBD's val, without VOC's val. Masks are
    VOC's own, with void borders, where VOC has one; SBD's, without void, for the others.
    """
    voc, sbd, splits = root / _VOC, root / _SBD / "dataset", ("train", "val")
    voc_train, val = (set(read_words(voc / f"ImageSets/Segmentation/{x}.txt")) for x in splits)
    train = voc_train.union(*(read_words(sbd / f"{split}.txt") for split in splits)) - val
    files = {name: KIND.files_of(name) for name in sorted(train | val)}
    images = {root / image: voc / image for image, _ in files.values()}
    masks = {root / files[name][1]: voc / files[name][1] for name in voc_train | val}
    drawn = {root / files[name][1]: sbd / f"cls/{name}.mat" for name in train - voc_train}
    named = {"train": train, "val": val}
    lists = {split: [" ".join(files[x]) for x in sorted(names)] for split, names in named.items()}
    return lists, [
        Step("images", _copy, images),
        Step("VOC masks", _copy, masks),
        Step("SBD masks", _write_sbd_mask, drawn),
    ]


def _copy(source: Path, path: Path) -> None:
    write_atomically(path, lambda partial: shutil.copyfile(source, partial))


def _write_sbd_mask(source: Path, path: Path) -> None:
    from scipy.io import loadmat  # no other command needs scipy

    try:
        found = loadmat(source, variable_names=["GTcls"])
        ids = np.asarray(found["GTcls"][0]["Segmentation"][0], np.uint8)
    except Exception as error:  # scipy raises many kinds
        raise UserError(
            f"{source}: cannot read SBD's mask in it ({error}); unpack benchmark.tgz again"
        ) from error
    save_mask(path, ids, KIND.palette())


PASCAL = DataSet("VOC 2012 with the masks of SBD (3.4 GB)", ARCHIVES, COUNTS, _plan, "scipy")
