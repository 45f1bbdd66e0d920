"""Small inputs that users bring: each trains, or ends in the one line that helps."""

import json
import re
import shlex
import shutil

import numpy as np
import pytest
import yaml
from conftest import SHARED, refusal

import train as train_program
from dataset.lists import read_picture, read_splits, refuse_broken_images
from dataset.splits.check import audit
from utils.config.reading import config_from

CASES = SHARED / "cases"
pytestmark = pytest.mark.skipif(not CASES.is_dir(), reason="needs ../shared/cases")
TWO = '"dataset.class_map={0: background, 255: object}" "dataset.ignore=[]"'


# What a row of the README ends in, or None: it trains; then words with which it trains.
RGB = "dataset.class_map={'#000000': background, '#800000': disc, '#008000': box}"
ROWS = {
    "base": (None, ()),
    "base12": (None, ()),
    "base_more": (None, ()),
    "grey_as_rgb": (None, ()),
    "img_i16_12bit": (None, ()),
    "bin255": ("if 255 is a class, set dataset.kind=custom", "dataset.kind"),
    "absent_lab": ("no labeled image shows 'box'; label one that does, or", '"dataset.classes'),
    "abs": ("is not in dataset.root, ", None),
    "comma": ("separate image and mask by a space, as in", None),
    "cvat": ("name CVAT's file: dataset.class_map=", ("dataset.class_map=labelmap.txt",)),
    "rgb": ("say in dataset.class_map which class each is ('#ff0000': NAME, in", (RGB,)),
    "roboflow": ("from a labeling tool: python -m dataset.prepare labels --help", None),
    "nounl": ("or train on labels alone by --method supervised", ("--method", "supervised")),
    "exif": ("turned upright by its EXIF orientation (6); turn", None),
    "img_5band": ("say which three are red, green and blue", ("dataset.bands=[3,2,1]",)),
}


def typed(case, outdir):
    """What a user types, with the settings of ``tiny.yaml``."""
    (outdir / "tiny.yaml").write_text(yaml.safe_dump(tiny()))
    words = "--config", outdir / "tiny.yaml", f"dataset.root={CASES / case}"
    return [*words, f"outdir={outdir}", f"name={case}"]


def test_every_case_is_a_row_here():
    assert {path.name for path in CASES.iterdir() if path.is_dir()} == ROWS.keys()


@pytest.mark.parametrize("case", [case for case, (told, _) in ROWS.items() if told])
def test_a_case_that_does_not_train_ends_in_the_line_that_helps(case, complaint, tmp_path):
    if case == "img_5band":
        pytest.importorskip("tifffile")
    line = complaint(train_program, *typed(case, tmp_path))
    assert ROWS[case][0] in line
    assert not (tmp_path / case).exists() or case == "img_5band"


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", [case for case, (_, words) in ROWS.items() if words is not None])
def test_a_case_trains_with_the_words_of_its_line(case, complaint, answer, tmp_path):
    if case == "img_5band":
        pytest.importorskip("tifffile")
    words = typed(case, tmp_path)
    fix = ROWS[case][1]
    if isinstance(fix, str):  # where it begins in the line
        fix = advised(complaint(train_program, *words), fix)
    lines = answer(train_program, *words, *fix)
    stages = json.loads((tmp_path / case / "results.json").read_text())["stages"]
    assert len(stages) == (1 if case == "nounl" else 6)
    assert lines[-1].startswith(list(stages)[-1])


def tiny():
    values = yaml.safe_load((CASES / "tiny.yaml").read_text())
    values["pseudo_label"].pop("neighbour_scales", None)  # as it was called
    return values


def config(case, *words):
    return config_from(tiny(), "tiny.yaml", [f"dataset.root={CASES / case}", *words])


def read(case, *words):
    return read_splits(config(case, *words).dataset)


def problems(case, *words):
    return [each["example"] for each in audit(config(case, *words))["problems"]]


def advised(line, start):
    """The settings that a line advises, as a shell splits them, from a word on."""
    return shlex.split(line[line.index(start) :].partition("; else")[0])


@pytest.mark.parametrize("case", ["base", "base12", "base_more"])
def test_what_is_right_is_read_without_a_note(case):
    notes = []
    read_splits(config(case).dataset, note=notes.append)
    assert notes == problems(case) == []


def test_an_object_of_255_is_not_ignored_silently():
    for words in (["dataset.classes=[background,object]"], []):
        line = refusal(read, "bin255", *words)
        assert line.startswith("dataset.labeled: its masks show id 0 and, ignored, 255 (")
        assert f"if 255 is a class, set {'' if words else 'dataset.kind=custom '}" in line
        assert line.endswith(f"{TWO}; else name masks of more than one class")
        assert problems("bin255", *words)[0] == line
        fix = advised(line, '"dataset.class_map' if words else "dataset.kind")
        assert problems("bin255", *words, *fix) == []
        classes = audit(config("bin255", *fix, *words))["classes"]
        shown = {row["name"]: row["share"] for row in classes}
        assert shown.keys() == {"background", "object"}
        assert 0 < shown["object"] < shown["background"]


def test_a_class_that_no_labeled_image_shows_is_named():
    line = refusal(read, "absent_lab")
    assert line.startswith("dataset.labeled: no labeled image shows 'box'; label one that does, or")
    assert problems("absent_lab") == [line]
    assert audit(config("absent_lab"))["unreachable"] == []
    notes = []
    settings = config("absent_lab", *advised(line, '"dataset.classes'))
    assert len(read_splits(settings.dataset, note=notes.append).labeled) == 4
    assert notes == ["dataset.val: 6.2% of the pixels are ignored, id 2"]


def test_pictures_of_twelve_bits_keep_their_levels():
    (note,) = refuse_broken_images(read("img_i16_12bit"))
    assert note == (
        "dataset.range: the values of 13 images of 16 bits end at 856 of 65535: 4 of 857 levels "
        "are left; set dataset.range=[0,856], or dataset.range=percentile"
    )
    assert audit(config("img_i16_12bit"))["notes"] == [note]

    def levels(*words):
        splits = read("img_i16_12bit", *words)
        assert refuse_broken_images(splits) == ([] if words else [note])
        return np.unique(np.asarray(read_picture(splits.labeled[0])))

    assert levels().max() == 856 // 256
    told = levels(re.search(r"dataset.range=\[.*?]", note)[0])
    assert (told.min(), told.max()) == (round(140 / 856 * 255), 255)
    assert len(told) > 80
    assert len(levels("dataset.range=percentile")) > 80


def test_a_picture_of_five_bands_asks_which_are_read():
    pytest.importorskip("tifffile")
    line = refusal(refuse_broken_images, read("img_5band", "dataset.bands=[3,2,6]"))
    assert "000.tif: has 5 bands, and dataset.bands=[3, 2, 6] reads band 6" in line
    line = refusal(refuse_broken_images, read("img_5band"))
    assert "000.tif: has 5 bands; say which three are red, green and blue" in line
    assert problems("img_5band")[0] == line
    assert problems("img_5band", re.search(r"dataset.bands=\[.*]", line)[0]) == []


def test_a_turn_by_exif_is_named():
    line = refusal(read, "exif")
    assert "000.png: this mask is 48 x 64 and its image" in line
    assert "is 64 x 48 (height x width), turned upright by its EXIF orientation (6); turn" in line
    assert problems("exif")[0] == line
    (note,) = (note for note in audit(config("exif"))["notes"] if "labeled: 4 of 4" in note)
    assert "are turned upright by their EXIF orientation, photos/000.jpg among them" in note


def test_whole_paths_in_the_root_are_read(tmp_path):
    line = refusal(read, "abs")
    assert "labeled.txt:1: /data/abs/photos/000.png is not in dataset.root, " in line
    moved = shutil.copytree(CASES / "abs", tmp_path / "abs")
    for path in moved.glob("*.txt"):
        path.write_text(path.read_text().replace("/data/abs/", f"{moved}/"))
    splits = read_splits(config("abs", f"dataset.root={moved}").dataset)
    assert list(map(len, splits)) == [4, 6, 3, 0]
    assert splits.labeled[0].name == "photos/000.png"


def test_commas_in_a_list_are_named():
    line = refusal(read, "comma")
    assert "labeled.txt:1: separate image and mask by a space, as in 'photos/000.png masks/" in line
    assert problems("comma")[0] == line


def test_labels_alone_need_no_list_of_unlabeled_images():
    assert problems("nounl", "stages=[1]") == []


def test_a_class_that_no_colour_shows_is_taken_out_as_the_line_says():
    classes = "dataset.classes=[background,disc,box,tram]"
    class_map = f"{RGB[:-1]}, '#0000ff': tram, '#ff0000': null}}"
    line = refusal(read, "rgb", classes, class_map)
    assert "no labeled image shows 'tram'; label one that does, or train without it: " in line
    notes = []
    fixed = config("rgb", *advised(line, '"dataset.classes'))
    assert len(read_splits(fixed.dataset, note=notes.append).labeled) == 4
    assert fixed.dataset.class_map["#ff0000"] is None
    assert notes == []


def test_more_classes_than_a_line_has_room_for_are_named_without_their_numbers():
    many = [f"c{number}" for number in range(9)]
    classes = f"dataset.classes=[background,disc,box,{','.join(many)}]"
    start = "take it out of dataset.classes and make its"
    line = refusal(read, "base", classes)
    assert line.endswith(f"{start} ids null in dataset.class_map")
    colours = ", ".join(f"'#0000{number + 1:02x}': c{number}" for number in range(9))
    line = refusal(read, "rgb", classes, f"{RGB[:-1]}, {colours}}}")
    assert line.endswith(f"{start} colour null in dataset.class_map")


def test_of_two_classes_none_is_taken_out():
    words = "dataset.classes=[all,tram]", "dataset.class_map={0: all, 1: all, 2: all, 3: tram}"
    assert refusal(read, "base", *words).endswith("shows 'tram'; label one that does")
