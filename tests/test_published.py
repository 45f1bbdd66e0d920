from pathlib import Path

import pytest

from dataset import published
from dataset.lists import read_lists, read_splits
from utils.config.reading import read_config
from utils.config.schema import DatasetSection
from utils.errors import UserError

PASCAL = {
    **{str(count): count for count in (92, 183, 366, 732, 1464)},
    **{"1_16": 662, "1_8": 1323, "1_4": 2646},
    **{"u2pl_1_16": 662, "u2pl_1_8": 1323, "u2pl_1_4": 2646},
}
CITYSCAPES = {"1_30": 100, "1_16": 186, "1_8": 372, "1_4": 744, "1_2": 1488}
COCO = {"1_512": 232, "1_256": 463, "1_128": 925, "1_64": 1849, "1_32": 3697}


def read(kind, split, root):
    section = DatasetSection(kind=kind, split=split, root=str(root))
    return read_lists(section)


def disjoint_names(splits) -> list[set[str]]:
    names = [{sample.name for sample in samples} for samples in splits]
    assert [len(each) for each in names] == [len(samples) for samples in splits]
    assert len(set.union(*names)) == sum(map(len, names))
    return names


@pytest.mark.parametrize(("split", "count"), PASCAL.items())
def test_pascal_splits_are_trainaug_in_two_parts(tmp_path, monkeypatch, split, count):
    monkeypatch.chdir(tmp_path)
    splits = read("pascal", split, tmp_path)
    labeled, unlabeled, val = disjoint_names(splits)
    trainaug = (published.FOLDER / "pascal/trainaug.txt").read_text().split()
    assert labeled | unlabeled == {f"JPEGImages/{each}.jpg" for each in trainaug}
    assert (len(labeled), len(unlabeled), len(val)) == (count, 10_582 - count, 1_449)
    assert splits.labeled[0].mask.parent == tmp_path / "SegmentationClass"
    assert {sample.mask for sample in splits.unlabeled} == {None}


@pytest.mark.parametrize(
    ("kind", "counts", "val"), [("cityscapes", CITYSCAPES, 500), ("coco", COCO, 5_000)]
)
def test_unlabeled_are_the_other_training_images_below_the_root(
    tmp_path, monkeypatch, kind, counts, val
):
    everything = set()
    for split in counts:
        _, lines = published.published_list(kind, split, "labeled", tmp_path)
        everything |= set(lines)
    pattern, _ = published.TRAINING[kind]
    for line in everything:
        path = tmp_path / (f"leftImg8bit/{line}_leftImg8bit.png" if kind == "cityscapes" else line)
        path = Path(str(path).split()[0])
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    monkeypatch.setitem(published.TRAINING, kind, (pattern, len(everything)))
    for split, count in counts.items():
        splits = read(kind, split, tmp_path)
        labeled, unlabeled, validation = disjoint_names(splits)
        assert (len(labeled), len(validation)) == (count, val)
        assert len(labeled | unlabeled) == len(everything)
    assert all(sample.image.is_file() for sample in [*splits.labeled, *splits.unlabeled])
    val_folder = "leftImg8bit/val/frankfurt" if kind == "cityscapes" else "val2017"
    assert splits.val[0].image.parent == tmp_path / val_folder


@pytest.mark.parametrize(
    ("kind", "keys", "told"),
    [
        ("pascal", {"split": "1_3"}, r"split: '1_3' is no published list of pascal; there are 14"),
        ("pascal", {"split": "val"}, r"split: 'val' is no published list of pascal"),
        ("demo", {"split": "1_16"}, r"split: '1_16' is no .* of demo; there are none: set split"),
        ("coco", {"split": "1_512"}, r"split: .* has 0 training images \(train2017/\*\.jpg\)"),
        ("pascal", {"split": "92", "val": "x"}, r"val: dataset\.split names the lists already"),
    ],
)
def test_split_that_cannot_be_used_says_why(tmp_path, kind, keys, told):
    with pytest.raises(UserError, match=rf"^dataset\.{told}"):
        read_splits(DatasetSection(kind=kind, root=str(tmp_path), **keys))


@pytest.mark.parametrize("name", ["pascal", "cityscapes", "coco"])
def test_configs_name_a_published_split(name, tmp_path):
    section = read_config(f"{name}.yaml", [f"dataset.root={tmp_path}"]).dataset
    published.published_list(name, section.split, "labeled", tmp_path)


@pytest.mark.parametrize("split", ["1_8", "92"])  # in YAML 1.1 both are numbers
def test_split_is_a_name_on_the_command_line(split):
    assert read_config("pascal.yaml", [f"dataset.split={split}"]).dataset.split == split
