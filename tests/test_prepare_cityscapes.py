import shutil

import numpy as np
import pytest
from PIL import Image

from dataset.catalog import KINDS
from dataset.prepare import __main__ as program
from dataset.prepare.cityscapes import CITYSCAPES, TRAIN_IDS
from dataset.prepare.work import prepare
from dataset.reading import read_mask

SMALL = CITYSCAPES._replace(counts={"train": 3, "val": 1})
FRAMES = {
    "train": [
        "aachen/aachen_000000_000019",
        "aachen/aachen_000001_000019",
        "ulm/ulm_000000_000019",
    ],
    "val": ["lindau/lindau_000000_000019"],
    "test": ["berlin/berlin_000000_000019"],
}
# The evaluated classes of cityscapesScripts; every other id is ignored.
TABLE = dict(zip([7, 8, 11, 12, 13, 17, *range(19, 29), 31, 32, 33], range(19), strict=True))


@pytest.fixture
def root(tmp_path):
    """Cityscapes unpacked: every label id, in a row of 34."""
    for split, frames in FRAMES.items():
        for frame in frames:
            image = tmp_path / f"leftImg8bit/{split}/{frame}_leftImg8bit.png"
            mask = tmp_path / f"gtFine/{split}/{frame}_gtFine_labelIds.png"
            for file in (image, mask):
                file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (34, 2)).save(image)
            Image.fromarray(np.tile(np.arange(34, dtype=np.uint8), (2, 1))).save(mask)
    return tmp_path


@pytest.mark.parametrize("workers", [0, 2])
def test_set_is_what_training_reads(root, read_back, workers):
    prepare(SMALL, root, False, workers)
    path = root / "gtFine/val/lindau/lindau_000000_000019_gtFine_labelTrainIds.png"
    expected = [TABLE.get(label, 255) for label in range(34)]
    assert np.asarray(read_mask(path)).tolist() == [expected, expected]
    assert {label: train for label, train in enumerate(TRAIN_IDS.tolist()) if train != 255} == TABLE
    with Image.open(path) as mask:
        assert (mask.mode, bytes(mask.getpalette())) == ("P", KINDS["cityscapes"].palette())
    assert len(list(root.rglob("*_labelTrainIds.png"))) == 4  # none for test
    assert (root / "val.txt").read_text() == (
        "leftImg8bit/val/lindau/lindau_000000_000019_leftImg8bit.png "
        "gtFine/val/lindau/lindau_000000_000019_gtFine_labelTrainIds.png\n"
    )
    assert [len(split) for split in read_back("cityscapes", root)] == [1, 2, 1]


def test_archives_fetched_by_hand_are_unpacked(root):
    for folder in ("leftImg8bit", "gtFine"):
        archive = str(root / f"{folder}_trainvaltest")
        shutil.make_archive(archive, "zip", root, folder)
        shutil.rmtree(root / folder)
    prepare(SMALL, root, False, 0)
    assert len(list(root.rglob("*_labelTrainIds.png"))) == 4


@pytest.mark.parametrize("words", [(), ("--download",)])
def test_download_is_impossible_and_both_files_are_named(tmp_path, complaint, words):
    page = "https://www.cityscapes-dataset.com/file-handling/?packageID="
    assert complaint(program, "cityscapes", "--root", tmp_path, *words) == (
        f"error: {tmp_path}: archives are missing; log in, since no program can, and put "
        f"there: leftImg8bit_trainvaltest.zip ({page}3), gtFine_trainvaltest.zip ({page}1)"
    )
