import pytest

from dataset.catalog import KINDS, describe, voc_colours
from utils.config.schema import DatasetSection
from utils.errors import UserError


def section(**keys):
    return DatasetSection(root="data", **keys)


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
    classes = describe(section(kind=kind)).classes
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
    kind = describe(section(kind="custom", classes=["cat", "dog"]))
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
        describe(section(**keys))


def test_two_classes_of_one_name_are_refused():
    # Tables and the query index are keyed by name: the second would overwrite the first.
    with pytest.raises((UserError, ValueError), match="cat"):
        describe(section(kind="custom", classes=["cat", "dog", "cat"]))
