import io
import stat
import tarfile
import zipfile

import pytest

from dataset.prepare import archives
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
GOOD = [("set/a/x.txt", b"x"), ("set/y.txt", b"y"), ("README", b"stays packed")]


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


@pytest.mark.parametrize("name", ["../evil", "set/../../evil", "/tmp/evil-of-a-test"])
def test_member_that_leaves_the_folder_is_named_and_nothing_stays(write, name):
    path = write([*GOOD, (name, b"evil")])
    line = f"{path}: its member {name} would be written outside; delete it and fetch it anew"
    assert refusal(path) == line
    assert [*path.parent.parent.rglob("*")] == [path.parent, path]


def test_link_is_named_and_nothing_stays(write):
    path = write([("set/link", "/etc"), ("set/link/evil", b"evil")])
    assert refusal(path).startswith(f"{path}: its member set/link is a link or a device; ")
    assert [*path.parent.iterdir()] == [path]


def test_archive_without_the_folder(write):
    path = write([("other/x", b"x")])
    assert refusal(path) == f"{path}: holds no set; delete it and fetch it anew"


def test_truncated_archive_is_refused_and_leaves_nothing(write):
    path = write([("set/big", bytes(range(256)) * 4000)])
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    assert f"{path}: cannot unpack this archive (" in refusal(path)
    assert [*path.parent.iterdir()] == [path]


def test_unpacking_goes_on_where_it_was_killed(write, monkeypatch):
    path = write(GOOD)
    copied = []

    def copy_once(member, target):
        if copied:
            raise KeyboardInterrupt
        copied.append(member.name)
        original(member, target)

    original = archives._copy
    monkeypatch.setattr(archives, "_copy", copy_once)
    with pytest.raises(KeyboardInterrupt):
        unpack(path, "set", path.parent / "there")
    assert not (path.parent / "there").exists()
    monkeypatch.setattr(
        archives,
        "_copy",
        lambda member, target: (copied.append(member.name), original(member, target)),
    )
    unpack(path, "set", path.parent / "there")
    assert copied == ["set/a/x.txt", "set/y.txt"]
    assert files_below(path.parent / "there") == {"a/x.txt": b"x", "y.txt": b"y"}


def archive_at(address, **more):
    return Archive("set.zip", "set", "set", f"{address}/set.zip", **more)


def test_missing_archive_names_its_address_and_its_place(tmp_path):
    with pytest.raises(UserError) as refused:
        provide(tmp_path, [archive_at("http://a")], fetch=False)
    assert str(refused.value) == (
        f"{tmp_path}: set missing; add --download, or fetch by hand and put there: "
        "set.zip (http://a/set.zip)"
    )


def test_archive_is_fetched_and_unpacked_and_then_left_alone(mirror, tmp_path):
    write_zip(mirror.folder / "set.zip", GOOD)
    provide(tmp_path, [archive_at(mirror.url)], fetch=True)
    assert files_below(tmp_path / "set") == {"a/x.txt": b"x", "y.txt": b"y"}
    provide(tmp_path, [archive_at("http://unreachable.invalid")], fetch=True)


def test_archive_of_another_digest_is_refused(mirror, tmp_path):
    write_zip(mirror.folder / "set.zip", GOOD)
    with pytest.raises(
        UserError, match=r"damaged or another: its md5 begins with .*, not 0000; it"
    ):
        provide(tmp_path, [archive_at(mirror.url, digest="0000", algorithm="md5")], fetch=True)
    assert not (tmp_path / "set").exists()


def test_download_that_fails_names_its_address_and_its_place(mirror, tmp_path):
    with pytest.raises(UserError) as refused:
        provide(tmp_path, [archive_at(mirror.url)], fetch=True)
    line = str(refused.value)
    assert line.startswith(f"{mirror.url}/set.zip: cannot be fetched (HTTP Error 404")
    assert line.endswith(f"fetch it by hand and save it as {tmp_path / 'set.zip'}")
