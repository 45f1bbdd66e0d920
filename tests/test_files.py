import os
import stat

import pytest

from utils.files import read_json, write_atomically, write_json


def test_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "results.json"
    write_json(path, {"miou": 0.5})

    def killed(partial):
        partial.write_text('{"miou": ')
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, killed)
    assert read_json(path) == {"miou": 0.5}


def test_folder_is_made_and_nothing_else_is_left_there(tmp_path):
    path = tmp_path / "deep" / "down" / "results.json"
    write_json(path, [1, None])
    assert read_json(path) == [1, None]
    assert list(path.parent.iterdir()) == [path]


def test_content_is_on_the_disk_before_its_name_and_the_name_thereafter(tmp_path, monkeypatch):
    path, flushed = tmp_path / "results.json", []

    def fsync(descriptor):
        flushed.append((stat.S_ISDIR(os.fstat(descriptor).st_mode), path.exists()))

    monkeypatch.setattr(os, "fsync", fsync)
    write_json(path, 1)
    assert flushed == [(False, False), (True, True)]
