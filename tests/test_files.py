"""Files that are whole or absent; masks and panels."""

import os
import stat

import numpy as np
import pytest
from conftest import refusal
from PIL import Image

from dataset.catalog import KINDS
from dataset.reading import read_mask
from utils.errors import UserError
from utils.files import in_background, read_json, write_atomically, write_json
from utils.panels import panel, save_mask, save_overlay


def test_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "results.json"
    write_json(path, {"miou": 0.5})

    def killed(partial):
        partial.write_text('{"miou": ')
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, killed)
    assert read_json(path) == {"miou": 0.5}
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_stays_and_its_target_is_written(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    target, link = tmp_path / "elsewhere" / "kept.json", tmp_path / "link.json"
    link.symlink_to(target)
    for value in (1, 2):  # a link without a target, too
        write_json(link, value)
        assert link.is_symlink()
        assert read_json(target) == value
    assert [*target.parent.iterdir()] == [target]


def test_a_file_that_is_replaced_hands_its_mode_on(tmp_path):
    path = tmp_path / "results.json"
    path.touch()
    path.chmod(0o640)
    write_json(path, 1)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_what_is_no_regular_file_takes_the_content_and_stays(tmp_path):
    pipe, link = tmp_path / "pipe", tmp_path / "link"
    os.mkfifo(pipe)
    link.symlink_to(pipe)
    reader = os.open(pipe, os.O_RDWR | os.O_NONBLOCK)
    write_json(link, [1])
    assert os.read(reader, 99) == b"[\n  1\n]\n"
    os.close(reader)
    assert pipe.is_fifo()
    assert {*tmp_path.iterdir()} == {pipe, link}


def test_a_folder_and_a_file_that_is_not_to_be_written_to_are_refused(tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    assert "Is a directory" in refusal(write_json, tmp_path / "folder", 1)
    write_json(tmp_path / "kept.json", 1)
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everything
    assert "Permission denied" in refusal(write_json, tmp_path / "kept.json", 2)
    assert read_json(tmp_path / "kept.json") == 1


def test_work_in_the_background_is_done_at_the_end_of_the_block(tmp_path):
    with in_background(2) as submit:
        results = [submit(write_json, tmp_path / f"{n}.json", n) for n in range(9)]
    assert [result.result() for result in results] == [None] * 9
    assert [read_json(tmp_path / f"{n}.json") for n in range(9)] == list(range(9))


def test_an_error_in_the_background_ends_the_work_soon(tmp_path):
    started = []

    def fail(number):
        started.append(number)
        raise UserError("disk full")

    def work():
        with in_background(1) as submit:
            for number in range(100):
                submit(fail, number)

    assert refusal(work) == "disk full"
    assert len(started) <= 3  # the first one, and two that waited

    def last():
        with in_background(1) as submit:
            submit(fail, 0)

    assert refusal(last) == "disk full"


def test_folder_is_made_and_nothing_else_is_left_there(tmp_path):
    path = tmp_path / "deep" / "down" / "results.json"
    write_json(path, [1, None])
    assert read_json(path) == [1, None]
    assert list(path.parent.iterdir()) == [path]


def test_numbers_that_are_not_finite_are_null(tmp_path):
    write_json(tmp_path / "x.json", {"a": [float("nan"), (float("inf"), 1.5)], "b": {"c": -0.0}})
    assert read_json(tmp_path / "x.json") == {"a": [None, [None, 1.5]], "b": {"c": 0.0}}


def test_content_is_on_the_disk_before_its_name_and_the_name_thereafter(tmp_path, monkeypatch):
    path, flushed = tmp_path / "results.json", []

    def fsync(descriptor):
        flushed.append((stat.S_ISDIR(os.fstat(descriptor).st_mode), path.exists()))

    monkeypatch.setattr(os, "fsync", fsync)
    write_json(path, 1)
    assert flushed == [(False, False), (True, True)]


def test_masks_of_a_stage_do_not_wait_for_the_disk_one_by_one(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: pytest.fail("waited"))
    save_mask(tmp_path / "m.png", np.zeros((2, 2), np.uint8), bytes(768), durable=False)
    assert list(tmp_path.iterdir()) == [tmp_path / "m.png"]


def test_mask_comes_back_with_its_ids_and_its_colours(tmp_path):
    ids = np.roll(np.arange(256, dtype=np.uint8), 1).reshape(2, 128)  # 255, 0, 1, ...
    save_mask(tmp_path / "new" / "m.png", ids, KINDS["pascal"].palette())
    assert np.array_equal(np.asarray(read_mask(tmp_path / "new" / "m.png")), ids)
    picture = Image.open(tmp_path / "new" / "m.png")
    assert picture.mode == "P"
    assert picture.convert("RGB").getpixel((16, 0)) == (192, 128, 128)  # 15: VOC's person
    assert picture.convert("RGB").getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("size", [(40, 60), (7, 300)])
def test_panel_shows_every_picture_at_its_place(size):
    colours = [[(250, 0, 0), (0, 250, 0)], [(0, 0, 250), (250, 250, 0)]]
    rows = [[Image.new("RGB", size[::-1], colour) for colour in row] for row in colours]
    drawn = np.asarray(panel(["one", "two"], rows, [("cat", (1, 2, 3))], height=50))
    width = round(size[1] * 50 / size[0])
    for row, pair in enumerate(colours):
        for column, colour in enumerate(pair):
            y, x = np.nonzero((drawn == colour).all(axis=2))
            assert len(x) == 50 * width  # whole: nothing lies over it, nothing is cut off
            assert (y.mean() > drawn.shape[0] / 2) == (row == 1)
            assert (x.mean() > drawn.shape[1] / 2) == (column == 1)
    assert (drawn == (1, 2, 3)).all(axis=2).any()  # the legend's swatch


def test_pictures_of_extreme_shapes_are_drawn(tmp_path):
    narrow = Image.new("RGB", (7, 3000))
    assert panel(["one"], [[narrow]], [("cat", (1, 2, 3))]).height > 144
    wide = Image.new("RGB", (70_000, 4))
    ids = np.zeros((4, 70_000), np.uint8)
    save_overlay(tmp_path / "o.jpg", wide, ids, KINDS["demo"].palette())
    assert Image.open(tmp_path / "o.jpg").width == 65_500


def test_legend_of_many_classes_breaks_into_lines():
    kind = KINDS["cityscapes"]
    legend = list(zip(kind.classes, kind.colours, strict=True))
    drawn = np.asarray(panel(["image"], [[Image.new("RGB", (200, 100))]], legend, 100))
    for name, colour in legend:
        assert (drawn == colour).all(axis=2).sum() >= 100, f"{name} is cut off"
