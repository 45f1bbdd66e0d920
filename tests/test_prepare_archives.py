import io
import stat
import tarfile
import zipfile

import pytest

from dataset.prepare.archives import Archive, provide, unpack
from utils.errors import UserError


def write_tar(path, members, mode="w:gz"):
    """Members are (name, bytes), or (name, target) for a link."""
    with tarfile.open(path, mode) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if isinstance(content, bytes):
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
            else:
                info.type, info.linkname = tarfile.SYMTYPE, content
                archive.addfile(info)
    return path


def write_zip(path, members):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members:
            info = zipfile.ZipInfo(name)
            if not isinstance(content, bytes):
                info.external_attr = (stat.S_IFLNK | 0o777) << 16
            archive.writestr(info, content)
    return path


WRITERS = {"set.tgz": write_tar, "set.zip": write_zip}
GOOD = [("set/a/x.txt", b"x"), ("set/y.txt", b"y"), ("README", b"is not moved")]


@pytest.fixture(params=WRITERS)
def write(request, tmp_path):
    """Write an archive below ``root``."""
    root = tmp_path / "root"
    root.mkdir()
    return lambda members: WRITERS[request.param](root / request.param, members)


def refusal(path):
    with pytest.raises(UserError) as refused:
        unpack(path, "set", path.parent / "there")
    return str(refused.value)


def files_below(folder):
    return {
        file.relative_to(folder).as_posix(): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file()
    }


def test_folder_of_an_archive_is_unpacked_and_the_rest_is_not(write):
    path = write(GOOD)
    unpack(path, "set", path.parent / "deep/there")
    assert files_below(path.parent / "deep/there") == {"a/x.txt": b"x", "y.txt": b"y"}
    assert {entry.name for entry in path.parent.iterdir()} == {path.name, "deep"}


@pytest.mark.parametrize("name", ["set/../../evil", "set/link"])
def test_nothing_is_written_outside(write, name):
    path = write([*GOOD, (name, b"evil" if name.endswith("evil") else "/etc")])
    if path.suffix == ".tgz":
        assert f"{path}: cannot unpack this archive (" in refusal(path)
    else:
        unpack(path, "set", path.parent / "there")
    assert not [*path.parent.parent.glob("evil")]
    assert not any(file.is_symlink() for file in path.parent.rglob("*"))


def test_archive_without_the_folder(write):
    path = write([("other/x", b"x")])
    assert f"{path}: cannot unpack this archive ([Errno 2]" in refusal(path)


def test_truncated_archive_is_refused_and_leaves_nothing(write):
    path = write([("set/big", bytes(range(256)) * 4000)])
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    assert f"{path}: cannot unpack this archive (" in refusal(path)
    assert [*path.parent.iterdir()] == [path]


def archive_at(address, **more):
    return Archive("set.zip", "set", "set", f"{address}/set.zip", **more)


def test_missing_archive_names_its_address_and_its_place(tmp_path):
    with pytest.raises(UserError) as refused:
        provide(tmp_path, [archive_at("http://a")], fetch=False)
    assert str(refused.value) == (
        f"{tmp_path}: archives are missing; add --download, or fetch by hand and put there: "
        "set.zip (http://a/set.zip)"
    )


def test_archive_is_fetched_and_unpacked_and_then_left_alone(mirror, tmp_path):
    write_zip(mirror.folder / "set.zip", GOOD)
    provide(tmp_path, [archive_at(mirror.url)], fetch=True)
    assert files_below(tmp_path / "set") == {"a/x.txt": b"x", "y.txt": b"y"}
    provide(tmp_path, [archive_at("http://unreachable.invalid")], fetch=True)
