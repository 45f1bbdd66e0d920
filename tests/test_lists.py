"""Lists of images: read from files of every spelling, and the published ones."""

import builtins
import re
import shutil
from pathlib import Path

import pytest
from conftest import SHARED, reading, refusal
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dataset import published
from dataset.catalog import KINDS
from dataset.lists import (
    Sample,
    Splits,
    is_same_list,
    line_of,
    read_list,
    read_lists,
    read_splits,
    read_val,
    with_pseudo_masks,
)
from dataset.loader import whole_images
from dataset.query import QueryRule, build_query_index
from utils.config.reading import read_config
from utils.config.schema import DatasetSection, QuerySection
from utils.errors import UserError

LISTS = SHARED / "lists"
PASCAL = KINDS["pascal"]


def read(tmp_path, text, kind=PASCAL):
    path = tmp_path / "list.txt"
    path.write_text(text)
    return read_list(path, Path("root"), kind)


def section(root, **keys):
    return DatasetSection(kind="demo", root=str(root), **keys)


@pytest.mark.parametrize(
    ("file", "count"),
    [
        ("st++/pascal/1_16/unlabeled.txt", 9920),
        ("st++/cityscapes/1_30/unlabeled.txt", 2875),
        ("u2pl/pascal/662/labeled.txt", 662),
        ("unimatch/coco/val.txt", 5000),
    ],
)
def test_real_lists_read_whole(file, count):
    if not (LISTS / file).is_file():
        pytest.skip(f"needs the published list ../shared/lists/{file}")
    kind = KINDS["cityscapes" if "cityscapes" in file else "pascal"]
    samples = read_list(LISTS / file, Path("root"), kind)
    assert len({sample.name for sample in samples}) == len(samples) == count
    assert all(sample.mask is not None for sample in samples)


@pytest.mark.parametrize(
    "text",
    [
        "JPEGImages/x.jpg SegmentationClass/x.png\n",
        "/JPEGImages/x.jpg /SegmentationClass/x.png",  # ST++ and CISC-R
        "./JPEGImages//x.jpg ./SegmentationClass/./x.png\r\n\r\n",
        "\ufeff  JPEGImages/x.jpg\tSegmentationClass/x.png  \r\n",
        '"/JPEGImages/x.jpg" SegmentationClass/x.png',
        "JPEGImages\\x.jpg .\\SegmentationClass\\x.png\r\n",  # of Windows
        f"{Path('root').absolute()}/JPEGImages/x.jpg SegmentationClass/x.png",
        "x",  # U2PL
        "\ufeffx\r\n",
    ],
)
def test_every_spelling_of_the_peers_names_the_same_sample(tmp_path, text):
    image, mask = Path("root/JPEGImages/x.jpg"), Path("root/SegmentationClass/x.png")
    assert read(tmp_path, text) == [Sample("JPEGImages/x.jpg", image, mask)]


@pytest.mark.parametrize("names", [("my photo.jpg", "its mask.png"), ("a b c.jpg", None)])
def test_paths_with_spaces_stand_in_double_quotes(tmp_path, names):
    image, mask = names
    sample = Sample(image, Path("root") / image, mask and Path("root") / mask, PASCAL.ids)
    (again,) = read(tmp_path, line_of(sample, Path("root")))
    assert again == sample


def test_a_whole_path_is_in_the_root_or_refused(tmp_path):
    (tmp_path / "JPEGImages").mkdir()
    (tmp_path / "list.txt").write_text(f"{tmp_path}/JPEGImages/x.jpg /JPEGImages/x.png")
    (sample,) = read_list(tmp_path / "list.txt", tmp_path, PASCAL)
    assert sample[:3] == (
        "JPEGImages/x.jpg",
        *(tmp_path / f"JPEGImages/x.{k}" for k in ("jpg", "png")),
    )
    for word in ("/elsewhere/x.jpg", r"C:\data\x.jpg"):
        (tmp_path / "list.txt").write_text(word)
        line = refusal(read_list, tmp_path / "list.txt", tmp_path, PASCAL)
        assert f"x.jpg is not in dataset.root, {tmp_path}; set dataset.root to" in line


def test_digests_tell_lists_apart_by_their_files_and_order_wherever_they_are(tmp_path):
    def digests(root, first="a.jpg a.png\nb.jpg b.png", second="b.jpg b.png\na.jpg a.png"):
        (tmp_path / "list.txt").write_text(first)
        one = read_list(tmp_path / "list.txt", root, PASCAL)
        (tmp_path / "list.txt").write_text(second)
        return Splits(one, one[:1], read_list(tmp_path / "list.txt", root, PASCAL)).digests()

    root = tmp_path / "one"
    root.mkdir()
    for name in ("a.jpg", "a.png", "b.jpg", "b.png"):
        (root / name).write_text(name)
    first = digests(root)
    names = ["labeled", "labeled files", "unlabeled", "unlabeled files", "val", "val files"]
    assert sorted(first) == names
    assert first["labeled"] != first["val"]
    assert first["unlabeled"] != digests(root, "a.jpg b.png")["unlabeled"]  # another mask
    root = root.rename(tmp_path / "other")
    assert digests(root) == first
    (root / "a.png").write_text("changed")
    changed = digests(root)
    assert [name for name in names if changed[name] != first[name]] == names[1::2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"list\.txt: this list is empty; .*12 lists of ST\+\+ and CISC-R are published empty"),
        ("a.jpg\n\na.jpg", r"list\.txt:3: a\.jpg is listed twice, as a\.jpg before; remove"),
        ("a.jpg\n./a.png", r"list\.txt:2: a\.png is listed twice, as a\.jpg before"),
        ("a.jpg a.png 3", r"list\.txt:1: a line reads 'image \[mask\]', not 'a\.jpg a\.png 3'"),
        ('a.jpg "a b.png', r"list\.txt:1: a double quote is not closed in"),
        ("my cat.jpg", r"list\.txt:1: a line reads .* paths with spaces stand in double quotes"),
        ("a.jpg UserError: x", r"list\.txt:1: a line reads .*, not 'a\.jpg UserError: x'"),
        ("a.jpg ../b.png", r"list\.txt:1: \.\./b\.png leaves the data root root"),
        ("../2007_000033", r"list\.txt:1: .* leaves the data root"),
        ("..\\b.png", r"list\.txt:1: \.\./b\.png leaves the data root"),
        ("a.jpg,b.png", r"list\.txt:1: separate image and mask by a space, as in 'a\.jpg b\.png'"),
        ("a.jpg; b.png", r"list\.txt:1: separate .* by a space, as in 'a\.jpg b\.png', not by ';'"),
        (". a.png", r"list\.txt:1: '\.' names no file; correct the line"),
        ("/ a.png", r"list\.txt:1: a line reads"),
    ],
)
def test_bad_list_names_file_and_line(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        read(tmp_path, text)


@given(text=st.text(max_size=40) | st.text("./ a\0\n", max_size=8))
def test_any_text_is_a_list_or_one_line_that_says_why_not(text, tmp_path_factory):
    path = tmp_path_factory.mktemp("any") / "list.txt"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        said = read_list(path, Path("root"), PASCAL)
    except UserError as error:
        said = str(error)
    assert said
    assert isinstance(said, list) or (said.startswith(str(path)) and "\n" not in said)


@given(text=st.text("ab./ \n\\", max_size=30))
def test_no_path_of_any_list_leaves_the_root(text, tmp_path_factory):
    root = tmp_path_factory.mktemp("root")
    (root / "list.txt").write_text(text)
    try:
        samples = read_list(root / "list.txt", root, PASCAL)
    except UserError:
        return
    for sample in samples:
        for path in (sample.image, sample.mask or sample.image):
            assert path.resolve().is_relative_to(root.resolve())


@pytest.mark.parametrize("slash", ["/", "//", "/./"])
@pytest.mark.parametrize(
    ("one", "other"), [("labeled", "unlabeled"), ("labeled", "val"), ("unlabeled", "val")]
)
def test_overlapping_lists_are_refused_however_they_spell_a_path(demo_copy, one, other, slash):
    first = (demo_copy / f"{one}.txt").read_text().splitlines()[0]
    with (demo_copy / f"{other}.txt").open("a") as lines:
        lines.write(first.split()[0].replace("/", slash) + "\n")
    line = refusal(read_splits, section(demo_copy))
    assert re.search(
        rf"dataset\.{one} and dataset\.{other} share 1 images, JPEG.* one list only", line
    )


@pytest.fixture
def opened(monkeypatch) -> set[str]:
    """Names of all files that Pillow or ``open`` open."""
    names = set()
    for place, real in ((Image, Image.open), (builtins, builtins.open)):

        def watched(file, *args, real=real, **keys):
            if isinstance(file, str | Path):
                names.add(Path(file).name)
            return real(file, *args, **keys)

        monkeypatch.setattr(place, "open", watched)
    return names


def test_masks_that_the_unlabeled_list_names_are_never_opened(demo_copy, opened):
    text = (demo_copy / "unlabeled.txt").read_text().replace("\n", " SegmentationClass/true.png\n")
    (demo_copy / "unlabeled.txt").write_text(text)  # the file is not even there
    splits = read_splits(section(demo_copy))
    for _ in whole_images(reading(), splits.unlabeled):
        pass
    build_query_index(splits.labeled, QueryRule.of(QuerySection(), KINDS["demo"]))
    assert [sample.mask for sample in splits.unlabeled] == [None] * 10
    assert {"0000.png", "0006.jpg"} <= opened  # the watch works
    assert "true.png" not in opened


def test_a_list_is_in_the_root_or_a_whole_path(demo_copy, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    whole = shutil.copy(demo_copy / "val.txt", Path("val.txt").absolute())
    Path("val.txt").write_text("stray")
    assert len(read_splits(section(demo_copy)).val) == 4
    (demo_copy / "val.txt").rename(demo_copy / "other.txt")
    line = refusal(read_splits, section(demo_copy))
    assert line.endswith(f"is not in {demo_copy}; set dataset.root=DIR or dataset.val={whole}")
    named = section(demo_copy).model_copy(update={"val": str(demo_copy / "other.txt")})
    assert len(read_splits(named).val) == 4


def test_val_alone_suffices_for_evaluation(demo_copy):
    for name in ("labeled", "unlabeled"):
        (demo_copy / f"{name}.txt").unlink()
    assert len(read_val(section(demo_copy))) == 4


def test_pseudo_masks_lie_by_name(tmp_path):
    (sample,) = read(tmp_path, "x/c.jpg")
    assert with_pseudo_masks([sample], Path("m"))[0].mask == Path("m/x/c.png")


PASCAL_SPLITS = {
    **{str(count): count for count in (92, 183, 366, 732, 1464)},
    **{"1_16": 662, "1_8": 1323, "1_4": 2646},
    **{"u2pl_1_16": 662, "u2pl_1_8": 1323, "u2pl_1_4": 2646},
}
CITYSCAPES_SPLITS = {"1_30": 100, "1_16": 186, "1_8": 372, "1_4": 744, "1_2": 1488}
COCO_SPLITS = {"1_512": 232, "1_256": 463, "1_128": 925, "1_64": 1849, "1_32": 3697}


def read_published(kind, split, root):
    return read_lists(DatasetSection(kind=kind, split=split, root=str(root)))


def disjoint_names(splits) -> list[set[str]]:
    names = [{sample.name for sample in samples} for samples in splits[:3]]
    assert [len(each) for each in names] == [len(samples) for samples in splits[:3]]
    assert len(set.union(*names)) == sum(map(len, names))
    return names


@pytest.mark.parametrize(("split", "count"), PASCAL_SPLITS.items())
def test_pascal_splits_are_trainaug_in_two_parts(tmp_path, monkeypatch, split, count):
    monkeypatch.chdir(tmp_path)
    splits = read_published("pascal", split, tmp_path)
    labeled, unlabeled, val = disjoint_names(splits)
    trainaug = (published.FOLDER / "pascal/trainaug.txt").read_text().split()
    assert labeled | unlabeled == {f"JPEGImages/{each}.jpg" for each in trainaug}
    assert (len(labeled), len(unlabeled), len(val)) == (count, 10_582 - count, 1_449)
    assert splits.labeled[0].mask.parent == tmp_path / "SegmentationClass"
    assert {sample.mask for sample in splits.unlabeled} == {None}


@pytest.mark.parametrize(
    ("kind", "counts", "val"),
    [("cityscapes", CITYSCAPES_SPLITS, 500), ("coco", COCO_SPLITS, 5_000)],
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
        splits = read_published(kind, split, tmp_path)
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


def test_lists_are_the_same_by_their_files_and_what_these_hold(demo_root, tmp_path):
    one = read_splits(DatasetSection(kind="demo", root=str(demo_root))).val
    moved = shutil.copytree(demo_root, tmp_path / "moved")
    other = read_splits(DatasetSection(kind="demo", root=str(moved))).val
    assert is_same_list(one, one)
    assert is_same_list(one, other)
    assert not is_same_list(one, other[:-1])
    assert not is_same_list(one, [other[0]._replace(ids=b"other"), *other[1:]])
    for file in (other[-1].mask, other[0].image):
        kept = file.read_bytes()
        file.write_bytes(one[1].mask.read_bytes())
        assert not is_same_list(one, other)
        file.write_bytes(kept)
    assert is_same_list(one, other)


@pytest.mark.parametrize("link", ["symlink_to", "hardlink_to"])
def test_one_picture_under_two_names_is_in_two_lists(demo_copy, link):
    image = demo_copy / "JPEGImages" / "1000.jpg"
    image.unlink()
    getattr(image, link)(demo_copy / "JPEGImages" / "0000.jpg")
    line = refusal(read_splits, DatasetSection(kind="demo", root=str(demo_copy)))
    assert "dataset.labeled and dataset.val share 1 images" in line


@pytest.mark.parametrize("name", ["JPEGImages", "JPEGImages/0*.jpg", "{}/JPEGImages/"])
def test_unlabeled_pictures_of_a_folder_or_a_glob(demo_root, name):
    """The images of the other lists are not among them."""
    keys = {"unlabeled": name.format(demo_root), "test": "test.txt"}
    found = read_splits(section(demo_root, **keys)).unlabeled
    assert found == sorted(read_splits(section(demo_root)).unlabeled)


def test_masks_of_the_other_lists_are_not_unlabeled(tmp_path):
    for name in ("a", "a_mask", "b", "c", "c_mask", "d", "d_mask"):
        Image.new("L", (4, 3)).save(tmp_path / f"{name}.png")
    for field, name in (("labeled", "a"), ("val", "c"), ("test", "d")):
        (tmp_path / f"{field}.txt").write_text(f"{name}.png {name}_mask.png")
    (sample,) = read_splits(section(tmp_path, unlabeled=".", test="test.txt")).unlabeled
    assert sample.name == "b.png"


@pytest.mark.parametrize("name", [".", "*"])
def test_pictures_beside_masks_of_their_names_in_a_root_with_brackets(tmp_path, name):
    root = tmp_path / "mine [2]"
    root.mkdir()
    for file in ("a.jpg", "a.png", "b.jpg", "c.jpg", "c.png"):
        Image.new("L", (4, 3)).save(root / file)
    for field, stem in (("labeled", "a"), ("val", "c")):
        (root / f"{field}.txt").write_text(f"{stem}.jpg {stem}.png")
    (sample,) = read_lists(section(root, unlabeled=name)).unlabeled
    assert sample.name == "b.jpg"


def test_unlabeled_folder_that_gives_nothing(demo_root, demo_copy):
    def read(root, name):
        return refusal(read_lists, section(root, unlabeled=name), ("unlabeled",))

    assert ", a folder or a glob" in read(demo_root, "gone")
    assert "/gone/*.jpg: no such file or folder, or no picture" in read(demo_root, "gone/*.jpg")
    assert "is not below dataset.root" in read(demo_root, str(demo_copy))
    assert "is not below dataset.root" in read(demo_root, "..")
    told = read(demo_root, "JPEGImages/1*.jpg")  # val
    assert told.endswith("has no picture besides those of the other lists")


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared")
def test_set_without_a_list_of_unlabeled_images():
    keys = {"kind": "custom", "root": str(SHARED / "cases/nounl"), "classes": ["a", "b", "c"]}
    assert "a folder or a glob" in refusal(read_splits, DatasetSection(**keys))
    splits = read_splits(DatasetSection(**keys, unlabeled="photos"))
    names = [sample.name for sample in splits.unlabeled]
    assert names == [f"photos/00{n}.png" for n in [4, 5, 6, 7, 8, 9]]
