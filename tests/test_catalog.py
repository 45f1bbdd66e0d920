"""Kinds of data sets, and masks of other ids: numbered anew, merged, dropped, of 16 bits."""

import numpy as np
import pytest
import torch
from conftest import SHARED, reading
from PIL import Image

from dataset.catalog import KINDS, dataset_info, id_table
from dataset.lists import read_label, read_splits, read_val, with_pseudo_masks
from dataset.loader import RandomStreams, SampleKey, whole_images
from dataset.query import Querier, QueryRule, build_query_index
from dataset.training import LabeledPairs
from utils.colours import voc_colours
from utils.config.schema import DatasetSection, QuerySection
from utils.errors import UserError


def test_voc_colours_are_pascals():
    # Read off the palette of VOC's own masks: background, aeroplane, bicycle, ..., tvmonitor.
    colours = voc_colours(21)
    assert colours[:4] == ((0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0))
    assert colours[15] == (192, 128, 128)  # person
    assert colours[20] == (0, 64, 128)
    assert voc_colours(256)[255] == (224, 224, 192)


@pytest.mark.parametrize(
    ("kind", "count", "some"),
    [
        ("pascal", 21, {0: "background", 1: "aeroplane", 15: "person", 20: "tvmonitor"}),
        ("cityscapes", 19, {0: "road", 10: "sky", 11: "person", 18: "bicycle"}),
        ("coco", 81, {0: "background", 1: "person", 12: "stop sign", 80: "toothbrush"}),
        ("camvid", 11, {0: "sky", 5: "tree", 10: "bicyclist"}),
        ("demo", 7, {0: "background"}),
    ],
)
def test_classes_stand_at_their_ids(kind, count, some):
    classes = dataset_info(DatasetSection(root="data", kind=kind)).classes
    assert len(classes) == len(set(classes)) == count
    assert {label: classes[label] for label in some} == some


@pytest.mark.parametrize("kind", KINDS)
def test_palette_gives_each_class_its_own_colour(kind):
    palette = KINDS[kind].palette()
    colours = [tuple(palette[3 * i : 3 * i + 3]) for i in range(256)]
    count = len(KINDS[kind].classes)
    assert len(palette) == 768
    assert tuple(colours[:count]) == KINDS[kind].colours
    assert len(set(colours[:count])) == count
    assert colours[255] == (255, 255, 255)
    assert (255, 255, 255) not in colours[:count]


def test_custom_classes_come_from_the_config():
    kind = dataset_info(custom("data", classes=["cat", "dog"]))
    assert kind.classes == ("cat", "dog")
    assert kind.colours == ((0, 0, 0), (128, 0, 0))


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"kind": "pascall"}, r"kind: 'pascall' is not one of pascal, .*custom"),
        ({"kind": "custom"}, "classes: missing; a custom kind needs"),
        ({"kind": "demo", "classes": ["a", "b"]}, "classes: kind 'demo' has its own; remove it"),
    ],
)
def test_kind_and_classes_must_fit(keys, told):
    with pytest.raises(UserError, match=rf"^dataset\.{told}"):
        dataset_info(DatasetSection(root="data", **keys))


def test_two_classes_of_one_name_are_refused():
    # Tables and the query index are keyed by name: the second would overwrite the first.
    with pytest.raises((UserError, ValueError), match="cat"):
        dataset_info(custom("data", classes=["cat", "dog", "cat"]))


CLASSES = ["ground", "thing"]


def custom(root, **keys):
    return DatasetSection(kind="custom", root=str(root), **{"classes": CLASSES, **keys})


@pytest.fixture
def own(tmp_path):
    """Write a set of one's own: a labeled and a val image of these ids, an unlabeled one alone."""

    def write(ids, dtype=np.uint8, mask="png"):
        ids = np.array(ids, dtype)
        for name, field in (("a", "labeled"), ("b", "unlabeled"), ("c", "val")):
            Image.new("RGB", ids.shape[::-1], "red").save(tmp_path / f"{name}.png")
            Image.fromarray(ids).save(tmp_path / f"{name}_ids.{mask}")
            (tmp_path / f"{field}.txt").write_text(f"{name}.png {name}_ids.{mask}")
        (tmp_path / "unlabeled.txt").write_text("b.png")
        return tmp_path

    return write


def label_of(section):
    return np.asarray(read_label(read_splits(section).labeled[0])).tolist()


def test_table_gives_every_id_its_meaning_by_hand():
    table = id_table(["a", "b", "c"], [9], {4: "a", 5: 2, 6: "a", 7: None})
    assert [int(table[id_]) for id_ in (4, 5, 6, 7, 9)] == [0, 2, 0, 255, 255]
    assert table.shape == (65536,)
    assert (np.delete(table, [4, 5, 6, 7, 9]) == -1).all()


def test_other_stands_for_the_ids_that_are_not_named():
    table = id_table(["a", "b"], [300], {7: "b", "other": "a"})
    assert [int(table[id_]) for id_ in (7, 300, 0, 255, 65535)] == [1, 255, 0, 0, 0]
    assert set(id_table(["a"], [], {"other": None})) == {255}


def test_without_a_map_ids_are_class_ids():
    table = id_table(["a", "b"])
    assert table[:2].tolist() == [0, 1]
    assert table[255] == 255
    assert (np.delete(table, [0, 1, 255]) == -1).all()


def test_table_of_colours():
    table = id_table(["a", "b"], [255], {"#0000ff": "b", "#ffffff": None, "other": "a"})
    assert table.shape == (1 << 24,)
    assert [int(table[colour]) for colour in (0x0000FF, 0xFFFFFF, 255 << 8)] == [1, 255, 0]


def labelmap_root(root, lines):
    (root / "labelmap.txt").write_text("# label:color_rgb:parts:actions\n" + lines)
    return root


def test_labelmap_is_read_once_into_class_map(tmp_path):
    root = labelmap_root(tmp_path, "ground:0,0,0::\nthing: 128,0,16:arm,leg:run\n\n")
    section = custom(root, class_map="labelmap.txt")
    assert section.class_map == {"#000000": "ground", "#800010": "thing"}
    assert dataset_info(section) == dataset_info(custom("gone", class_map=section.class_map))


def test_labelmap_of_datumaro_without_colours(tmp_path):
    """Of classes that no mask shows; or of all of them, which then have Pascal's colours."""
    some = labelmap_root(tmp_path, "ground:0,0,0::\nsky:::\nthing:128,0,16::\n")
    found = custom(some, class_map="labelmap.txt").class_map
    assert found == {"#000000": "ground", "#800010": "thing"}
    none = labelmap_root(tmp_path, "ground:::\nsky:::\nthing::arm,leg:run\n")
    found = custom(none, class_map="labelmap.txt").class_map
    assert found == {"#000000": "ground", "#800000": "sky", "#008000": "thing"}


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        ("thing:red::", r"labelmap\.txt:2: a line reads 'name:red,green,blue::', .* 'thing:red::'"),
        ("thing 1,2,3", r"labelmap\.txt:2: a line reads 'name:red,green,blue::', .* 'thing 1,2,3'"),
        ("thing:1,2,300::", r"labelmap\.txt:2: a line reads .* with 0 to 255"),
        ("thing:1,2,3::\nground:1,2,3::", r":3: ground has the colour of thing; give it another"),
        ("", r"labelmap\.txt: names no class"),
        ("sky:1,2,3::", r"dataset\.class_map: 'sky' is no class; there are ground, thing"),
    ],
)
def test_labelmap_that_is_wrong(tmp_path, lines, told):
    with pytest.raises(UserError, match=told):
        dataset_info(custom(labelmap_root(tmp_path, lines), class_map="labelmap.txt"))


def test_labelmap_that_is_missing(tmp_path):
    with pytest.raises(UserError, match=r"map\.txt: cannot read this label map .* dataset\.root"):
        custom(tmp_path, class_map="map.txt")


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared")
@pytest.mark.parametrize(
    ("case", "keys"),
    [
        ("cvat", {"class_map": "labelmap.txt"}),
        ("rgb", {"class_map": {"#000000": 0, "#800000": "disc", "#008000": "box"}}),
        ("grey_as_rgb", {}),
    ],
)
def test_masks_as_tools_write_them(case, keys):
    """The labeled images of all three show the scenes of ``base``."""
    classes = ["background", "disc", "box"]
    read = [
        read_splits(custom(SHARED / "cases" / name, classes=classes, **more))
        for name, more in (("base", {}), (case, keys))
    ]
    for ours, theirs in zip(*(splits.labeled for splits in read), strict=True):
        assert np.array_equal(*(np.asarray(read_label(sample)) for sample in (ours, theirs)))


def test_colours_without_a_meaning_are_all_named(own):
    root = own([[0, 1]])
    colours = np.array([[[0, 0, 0], [9, 0, 255]]], np.uint8)
    Image.fromarray(colours).save(root / "c_ids.png")
    message = r"c_ids\.png: no meaning for colour '#0900ff'; .* in dataset\.class_map.* all colours"
    with pytest.raises(UserError, match=message):
        read_splits(custom(root, class_map={"#000000": "ground", "#010101": "thing"}))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"class_map": {3: "think", "#00ff00": "thing"}}, "class_map: 'think' is no class"),
        ({"class_map": {3: "thing", "#00ff00": "thing"}}, "class_map: has ids and colours; name"),
        ({"class_map": {3: "think"}}, r"class_map: 'think' is no class; there are ground, thing"),
        ({"class_map": {3: 2}}, r"class_map: 2 is no class; there are ground, thing"),
        ({"class_map": {255: "thing"}}, r"ignore: id 255 is class 'thing' too; take it off"),
        ({"ignore": 0}, r"ignore: id 0 is class 'ground' too; .*dataset\.class_map"),
    ],
)
def test_contradiction_is_told_before_a_file_is_opened(keys, message):
    with pytest.raises(UserError, match=rf"^dataset\.{message}"):
        dataset_info(custom("nowhere", **keys))


def test_ids_are_merged_and_dropped(own):
    root = own([[3, 4, 5], [0, 9, 255]])
    section = custom(root, class_map={0: "ground", 3: "thing", 4: 1, 5: None, 9: None})
    assert label_of(section) == [[1, 1, 255], [0, 255, 255]]


@pytest.mark.parametrize("mask", ["png", "tif"])
def test_ids_of_sixteen_bits(own, mask):
    root = own([[0, 1000, 65535], [256, 1000, 7]], np.uint16, mask=mask)
    section = custom(root, class_map={0: "ground", 1000: "thing", "other": None}, ignore=65535)
    assert label_of(section) == [[0, 1, 255], [255, 1, 255]]


def test_palette_and_two_colours(own):
    root = own([[0, 1], [1, 0]], bool)
    assert label_of(custom(root)) == [[0, 1], [1, 0]]
    palette = Image.fromarray(np.array([[2, 3], [3, 7]], np.uint8))
    palette.putpalette(bytes(range(24)))
    palette.save(root / "a_ids.png")
    section = custom(root, class_map={0: "ground", 1: "thing", 2: "thing", 3: "ground"}, ignore=7)
    assert label_of(section) == [[1, 0], [0, 255]]


@pytest.mark.parametrize("number", [70000, -1])
def test_ids_beyond_sixteen_bits_are_refused(own, number):
    root = own([[0, number]], np.int32, mask="tif")
    with pytest.raises(UserError, match=r"a_ids\.tif: ids go from -?\d+ to \d+, not from 0 to 65"):
        read_splits(custom(root))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({}, r"no meaning for id 3, 9; classes are from 0 to 1: add .* dataset\.ignore"),
        ({"class_map": {3: "thing"}}, r"no meaning for id 0, 9; .* in dataset\.class_map"),
        ({"ignore": [3, 255]}, r"no meaning for id 9; .*'other: null'"),
    ],
)
@pytest.mark.parametrize("read", [read_splits, read_val])
def test_ids_without_meaning_are_all_named(own, read, keys, message):
    root = own([[0, 3, 9, 255]])
    with pytest.raises(UserError, match=rf"_ids\.png: {message}"):
        read(custom(root, **keys))


def test_set_that_a_map_leaves_empty_is_refused(own):
    root = own([[0, 1]])
    with pytest.raises(UserError, match=r"dataset\.labeled: every pixel of its masks is ignored"):
        read_splits(custom(root, class_map={"other": None}))


def test_pseudo_masks_hold_class_ids_whatever_the_files_hold(own, tmp_path):
    splits = read_splits(custom(own([[7, 8]]), class_map={7: "thing", 8: "ground"}))
    (tmp_path / "pseudo").mkdir()
    Image.fromarray(np.array([[0, 1]], np.uint8)).save(tmp_path / "pseudo/b.png")
    (sample,) = with_pseudo_masks(splits.unlabeled, tmp_path / "pseudo")
    assert np.asarray(read_label(sample)).tolist() == [[0, 1]]


def test_training_and_queries_see_merged_classes(demo_root, augment):
    kind = {"kind": "custom", "root": str(demo_root), "classes": CLASSES}
    splits = read_splits(DatasetSection(**kind, class_map={0: "ground", "other": "thing"}))
    rule = QueryRule.of(QuerySection(exclude=["ground"]), dataset_info(custom(demo_root)))
    assert build_query_index(splits.labeled, rule).keys() == {1}
    querier = Querier(splits.labeled, build_query_index(splits.labeled, rule), rule, augment)
    pairs = LabeledPairs(splits.labeled, augment, RandomStreams(0, "1_supervised"), 1, querier)
    pair = pairs[SampleKey(0, 0)]
    assert pair.shared_class == 1
    assert set(torch.cat([pair.label, pair.partner_label]).unique().tolist()) <= {0, 1, 255}
    (item,) = whole_images(reading(), splits.val[:1])
    assert set(item.label.unique().tolist()) == {0, 1, 255}
