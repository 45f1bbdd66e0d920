import io
import sys
import tarfile

import numpy as np
import pytest
from conftest import refusal
from PIL import Image

from dataset.catalog import KINDS
from dataset.prepare import __main__ as program
from dataset.prepare.pascal import PASCAL
from dataset.prepare.work import prepare
from dataset.reading import read_mask

scipy_io = pytest.importorskip("scipy.io", reason="scipy reads and writes SBD's .mat files")

SMALL = PASCAL._replace(counts={"train": 4, "val": 1})
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
    scipy_io.savemat(path, {"GTcls": fields}, do_compression=True)


@pytest.fixture
def root(tmp_path):
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


def ids_of(root, name):
    return np.asarray(read_mask(root / f"SegmentationClass/{name}.png")).tolist()


def test_trainaug_is_the_union_without_val(root, read_back):
    prepare(SMALL, root, False, 0)
    line = "JPEGImages/{0}.jpg SegmentationClass/{0}.png\n".format
    assert (root / "train.txt").read_text() == "".join(
        map(line, ["2007_1", "2007_2", "2008_3", "2008_4"])
    )
    assert (root / "val.txt").read_text() == line("2007_9")
    assert len(list((root / "JPEGImages").iterdir())) == 5
    assert [len(split) for split in read_back("pascal", root)] == [1, 3, 1]
    for name in ("2007_1", "2007_2", "2007_9"):
        assert ids_of(root, name) == VOC_IDS.tolist()
    for name in ("2008_3", "2008_4"):
        assert ids_of(root, name) == SBD_IDS.tolist()


@pytest.mark.parametrize("content", [b"not a .mat", b""])
def test_damaged_mat_is_named(root, content):
    damaged = root / SBD / "cls/2008_3.mat"
    damaged.write_bytes(content)
    line = refusal(prepare, SMALL, root, False, 0)
    assert line.startswith(f"{damaged}: cannot read SBD's mask in it (")


def test_archives_in_the_root_are_unpacked_if_their_digest_is_right(root):
    path = root / "benchmark.tgz"
    with tarfile.open(path, "w:gz") as archive:
        archive.add(root / "benchmark_RELEASE", "benchmark_RELEASE")
        archive.addfile(tarfile.TarInfo("._benchmark_RELEASE"), io.BytesIO())
    (root / "benchmark_RELEASE").rename(root.parent / "gone")
    line = refusal(prepare, SMALL, root, False, 0)
    assert line.startswith(f"{path}: a damaged or another file: its md5 begins with")
    unchecked = [archive._replace(digest="") for archive in PASCAL.archives]
    prepare(SMALL._replace(archives=unchecked), root, False, 0)
    assert ids_of(root, "2008_3") == SBD_IDS.tolist()


def test_scipy_is_asked_for_before_anything_is_fetched(root, complaint, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    line = complaint(program, "pascal", "--root", root, "--download")
    assert line == "error: scipy: not installed; run: pip install scipy"
