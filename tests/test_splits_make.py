import random
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from conftest import SHARED
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dataset.catalog import KINDS
from dataset.query import QueryRule
from dataset.splits import __main__ as program
from dataset.splits.make import count_labeled, cover, make_lists
from utils.errors import UserError

CAMVID = SHARED / "camvid"
NAMES = [f"JPEGImages/{number:04}.jpg" for number in range(100)]


@pytest.fixture
def train(tmp_path) -> Path:
    """A list of 100 images, without files."""
    path = tmp_path / "train.txt"
    path.write_text("".join(f"{name} SegmentationClass/{name[11:15]}.png\n" for name in NAMES))
    return path


def labeled(folder) -> set[str]:
    return {line.split()[0] for line in (folder / "labeled.txt").read_text().splitlines()}


def texts(folder) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("total", "shares"),
    [
        (367, {"1/8": 46, "1/16": 23}),  # CamVid
        (10582, {"1/16": 662, "1/8": 1323, "1/4": 2646}),  # Pascal; ST++ has 2645
        (2975, {"1/30": 100, "1/16": 186, "1/8": 372, "1/4": 744}),  # Cityscapes
        (118287, {"1/512": 232, "1/256": 463, "1/128": 925, "1/64": 1849, "1/32": 3697}),  # COCO
        (100, {"0.07": 7, "7e-2": 7, "0.071": 8}),  # 100 * 0.07 is a little more than 7 in binary
    ],
)
def test_shares_are_rounded_up_as_published(total, shares):
    assert {text: count_labeled(total, Fraction(text)) for text in shares} == shares


@pytest.mark.parametrize("share", [Fraction(0), Fraction(1), Fraction(999, 1000), 0, 100, -3])
def test_neither_list_may_be_empty(share):
    with pytest.raises(UserError, match=r"labels -?\d+ of 100 images; label one at least"):
        count_labeled(100, share)


def test_writes_every_image_once_and_no_mask_of_unlabeled_ones(train, answer, tmp_path):
    out = tmp_path / "1_8"
    assert answer(program, "make", "--train", train, "--fraction", "1/8", "--out", out) == [
        f"{out}/labeled.txt: 13 of 100 images",
        f"{out}/unlabeled.txt: the other 87, without masks",
    ]
    rest = (out / "unlabeled.txt").read_text().splitlines()
    assert sorted([*labeled(out), *rest]) == NAMES
    assert set((out / "labeled.txt").open()) < set(train.open())


def test_seed_decides_and_the_order_of_the_list_does_not(train, tmp_path):
    make_lists(train, 3, 0, tmp_path / "a")
    lines = train.read_text().splitlines()
    random.Random(1).shuffle(lines)
    train.write_text("\ufeff" + "\r\n./".join(["", *lines]))  # nor its spelling
    make_lists(train, 3, 0, tmp_path / "b")
    make_lists(train, 3, 1, tmp_path / "c")
    assert texts(tmp_path / "a") == texts(tmp_path / "b")
    assert labeled(tmp_path / "a") != labeled(tmp_path / "c")
    # The first of: printf '0 JPEGImages/0078.jpg' | sha256sum, for every name, sorted.
    assert labeled(tmp_path / "a") == {
        f"JPEGImages/{name}.jpg" for name in ("0018", "0073", "0078")
    }


def test_ids_and_paths_give_one_split(train, answer, tmp_path):
    ids = tmp_path / "ids.txt"
    ids.write_text("\n".join(name[11:15] for name in NAMES))
    words = ["make", "--count", 9, "--train"]
    answer(program, *words, train, "--out", tmp_path / "a")
    answer(program, *words, ids, "--out", tmp_path / "b", "--config", "pascal.yaml")
    assert texts(tmp_path / "a") == texts(tmp_path / "b")


@settings(max_examples=15)
@given(counts=st.sets(st.integers(1, 99), min_size=2, max_size=3), seed=st.integers(0, 99))
def test_smaller_lists_lie_inside_larger_ones(counts, seed, tmp_path_factory):
    folder = tmp_path_factory.mktemp("nested")
    (folder / "train.txt").write_text("".join(f"{name} x/{name}\n" for name in NAMES))
    for count in counts:
        make_lists(folder / "train.txt", count, seed, folder / str(count))
    for smaller, larger in pairwise(sorted(counts)):
        assert labeled(folder / str(smaller)) < labeled(folder / str(larger))


def test_cover_takes_the_rarest_first_then_what_shows_most():
    rows = [{"road"}, {"road", "car"}, {"road", "bus"}, {"road", "car", "bus"}, {"tram"}]
    # bus, car and tram: two, two, one of five rows. Row 3 then shows both others.
    assert cover([frozenset((name, False) for name in row) for row in rows]) == [4, 3]
    assert cover([]) == cover([frozenset()]) == []


@given(st.lists(st.frozensets(st.tuples(st.integers(0, 5), st.booleans())), max_size=12))
def test_cover_shows_all_that_can_be_shown_and_no_row_in_vain(shown):
    chosen, seen = cover(shown), frozenset()
    for row in chosen:
        assert not shown[row] <= seen
        seen |= shown[row]
    assert seen == frozenset().union(*shown)


RULE = QueryRule(num_classes=4, min_area=0.25, excluded=frozenset({0}))


@pytest.fixture
def rare(tmp_path, train) -> Path:
    """Images for the list: all show 0, half show 1; one shows a little 2, another much; none 3."""
    for number, name in enumerate(NAMES):
        ids = np.zeros((4, 4), np.uint8)
        ids[0] = number % 2
        if number in (17, 71):
            ids[3, : 1 if number == 17 else 4] = 2
        (tmp_path / "JPEGImages").mkdir(exist_ok=True)
        (tmp_path / "SegmentationClass").mkdir(exist_ok=True)
        Image.new("L", (4, 4)).save(tmp_path / name)
        Image.fromarray(ids).save(tmp_path / f"SegmentationClass/{name[11:15]}.png")
    return train


STRATIFY = ["--stratify", "--config", "pascal.yaml", "dataset.kind=custom"]
CLASSES = ["dataset.classes=[road, car, bus, tram]", "query={min_area: 0.25, exclude: [road]}"]


@pytest.mark.parametrize("seed", range(5))
def test_stratified_lists_keep_the_image_that_alone_shows_enough_of_a_class(rare, answer, seed):
    folder = rare.parent
    lines = answer(
        *[program, "make", "--train", rare, *STRATIFY, "--count", 2, "--out", folder / "out"],
        *[f"dataset.root={folder}", *CLASSES, "--seed", seed],
    )
    assert NAMES[71] in labeled(folder / "out")
    assert lines[2:] == [
        "no labeled image shows tram",
        "no labeled image shows tram on 0.25 of its pixels",
    ]


def test_stratified_lists_are_nested_and_the_rest_is_chance(rare, tmp_path):
    kind = KINDS["demo"]._replace(classes=("road", "car", "bus", "tram"))
    for count in (2, 10, 30):
        make_lists(rare, count, 0, tmp_path / f"s{count}", tmp_path, kind, RULE)
    make_lists(rare, 30, 0, tmp_path / "plain")
    assert labeled(tmp_path / "s2") < labeled(tmp_path / "s10") < labeled(tmp_path / "s30")
    assert len(labeled(tmp_path / "s30") & labeled(tmp_path / "plain")) >= 27


def test_lists_of_a_run_are_never_replaced_by_others(train, complaint, tmp_path):
    out = tmp_path / "out"
    make_lists(train, 13, 0, out)
    make_lists(train, 13, 0, out)  # the same again is fine
    before = texts(out)
    line = complaint(program, "make", "--train", train, "--count", 14, "--out", out)
    assert line.startswith(f"error: {out}/labeled.txt: is there with other lines, and a run may")
    (out / "labeled.txt").unlink()  # unlabeled.txt still differs: neither is written
    complaint(program, "make", "--train", train, "--count", 14, "--out", out)
    assert texts(out) == {"unlabeled.txt": before["unlabeled.txt"]}


@pytest.mark.parametrize(
    ("text", "words", "told"),
    [
        (None, "--fraction 1/0", "error: --fraction: '1/0' is no share; write 1/8 or 0.125"),
        (None, "--fraction 1e-999999999", "'1e-999999999' is no share; write 1/8 or 0.125"),
        (None, "--fraction some", "error: --fraction: 'some' is no share; write 1/8 or 0.125"),
        (None, "--fraction 2", "2: that labels 200 of 100 images; label one at least, and not all"),
        (None, "--count 2 --stratify", "error: --config: missing; --stratify and settings need"),
        (None, "--count 2 seed=1", "error: --config: missing; --stratify and settings need"),
        ("a.jpg a.png\nb.jpg", "--count 1", "train.txt: b.jpg has no mask; name it beside it"),
        ("0001\n0002", "--count 1", "train.txt:1: 0001 is a bare id; --config FILE tells"),
        ("", "--count 1", "train.txt: this list is empty"),
    ],
)
def test_bad_words_and_training_lists(train, complaint, tmp_path, text, words, told):
    if text is not None:
        train.write_text(text)
    words = "make", "--train", train, "--out", tmp_path / "out", *words.split()
    assert told in complaint(program, *words)
    assert not (tmp_path / "out").exists()


def test_camvid_keeps_all_classes_within_few_images(answer, tmp_path):
    if not CAMVID.is_dir():
        pytest.skip("needs the CamVid set in ../shared/camvid")
    words = ["make", "--train", CAMVID / "train.txt", "--count", 6, "--out", tmp_path, "--stratify"]
    settings = ["--config", "camvid.yaml", f"dataset.root={CAMVID}", "query.min_area=0.03"]
    lines = answer(program, *words, *settings)
    assert lines == [
        f"{tmp_path}/labeled.txt: 6 of 367 images",
        f"{tmp_path}/unlabeled.txt: the other 361, without masks",
    ]
