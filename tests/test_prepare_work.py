"""Archives and weights are fetched and unpacked; parallel work writes files from them."""

import errno
import hashlib
import io
import os
import socket
import stat
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, refusal

from dataset.prepare import __main__ as program
from dataset.prepare.archives import Archive, download, provide, unpack
from dataset.prepare.work import DataSet, Step, prepare, read_words, refuse_missing
from utils.errors import UserError
from utils.files import write_text


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


def refused(path):
    return refusal(unpack, path, "set", path.parent / "there")


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
        assert f"{path}: cannot unpack this archive (" in refused(path)
    else:
        unpack(path, "set", path.parent / "there")
    assert not [*path.parent.parent.glob("evil")]
    assert not any(file.is_symlink() for file in path.parent.rglob("*"))


def test_archive_without_the_folder(write):
    path = write([("other/x", b"x")])
    assert f"{path}: cannot unpack this archive ([Errno 2]" in refused(path)


def test_truncated_archive_is_refused_and_leaves_nothing(write):
    path = write([("set/big", bytes(range(256)) * 4000)])
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    assert f"{path}: cannot unpack this archive (" in refused(path)
    assert [*path.parent.iterdir()] == [path]


def spoil_zip(path, offset, value):
    """Change two bytes of the headers of a zip file's only member."""
    content = bytearray(path.read_bytes())
    for signature, place in ((b"PK\3\4", offset), (b"PK\1\2", offset + 2)):
        start = content.index(signature) + place
        content[start : start + 2] = value.to_bytes(2, "little")
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("offset", "value", "told"),
    [(6, 1, "encrypted"), (8, 97, "compression method is not supported")],
)
def test_zips_that_cannot_be_read_are_named(tmp_path, offset, value, told):
    path = tmp_path / "set.zip"
    write_zip(path, [("set/a", b"a")])
    spoil_zip(path, offset, value)
    line = refused(path)
    assert f"{path}: cannot unpack this archive (" in line
    assert told in line


def test_damaged_lzma_is_named(tmp_path):
    path = tmp_path / "set.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("set/a", b"a" * 999)
    content = bytearray(path.read_bytes())
    begin = content.index(b"set/a") + len(b"set/a")
    content[begin + 4 : begin + 9] = b"\xff" * 5  # LZMA's properties
    path.write_bytes(content)
    assert f"{path}: cannot unpack this archive (" in refused(path)


@pytest.mark.parametrize("time", ["nan", "1e30", "-1e30"])
def test_tars_of_times_that_are_none_are_named(tmp_path, time):
    path = tmp_path / "set.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        member = tarfile.TarInfo("set/a")
        member.pax_headers = {"mtime": time}
        archive.addfile(member)
    assert f"{path}: cannot unpack this archive (" in refused(path)


def test_archives_that_unpack_to_too_much_are_refused(write):
    path = write([("set/a", bytes(1000)), ("set/b", bytes(1001))])
    line = refusal(unpack, path, "set", path.parent / "there", 2e-6)
    assert f"{path}: unpacks to more than the 2e-06 GB that the data set has at most" in line
    assert [*path.parent.iterdir()] == [path]
    unpack(path, "set", path.parent / "there", 2.001e-6)


def test_a_full_disk_is_not_the_archives_fault(write, monkeypatch):
    path = write(GOOD)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "replace", full)
    line = refused(path)
    assert "cannot unpack" in line
    assert "No space left on device); make room" in line


def test_what_a_killed_run_left_is_removed_first(write):
    path = write(GOOD)
    left = path.with_name(f".{path.name}.unpacked") / "set"
    left.mkdir(parents=True)
    (left / "old").touch()
    unpack(path, "set", path.parent / "there")
    assert files_below(path.parent / "there") == {"a/x.txt": b"x", "y.txt": b"y"}


def archive_at(address, **more):
    return Archive("set.zip", "set", "set", f"{address}/set.zip", **more)


def test_missing_archive_names_its_address_and_its_place(tmp_path):
    assert refusal(provide, tmp_path, [archive_at("http://a")], fetch=False) == (
        f"{tmp_path}: archives are missing; add --download, or fetch by hand and put them there: "
        "set.zip (http://a/set.zip)"
    )


def test_archive_is_fetched_and_unpacked_and_then_left_alone(mirror, tmp_path):
    write_zip(mirror.folder / "set.zip", GOOD)
    provide(tmp_path, [archive_at(mirror.url)], fetch=True)
    assert files_below(tmp_path / "set") == {"a/x.txt": b"x", "y.txt": b"y"}
    provide(tmp_path, [archive_at("http://unreachable.invalid")], fetch=True)


BODY = b"weights" * 20_000
SHA256, MD5 = hashlib.sha256(BODY).hexdigest(), hashlib.md5(BODY).hexdigest()


@pytest.fixture
def url(mirror):
    (mirror.folder / "file").write_bytes(BODY)
    return f"{mirror.url}/file"


@pytest.fixture
def path(tmp_path):
    return tmp_path / "made" / "weights.pth"


@pytest.mark.parametrize(
    "digest", [(SHA256[:8],), (SHA256,), (MD5, "md5"), ("",)], ids=["prefix", "sha256", "md5", "no"]
)
def test_file_of_the_digest_is_fetched_once(url, path, digest):
    download(url, path, *digest)
    assert path.read_bytes() == BODY
    assert list(path.parent.iterdir()) == [path]
    download("http://unreachable.invalid", path, *digest)


@pytest.mark.parametrize("digest", [("0" * 8,), ("0" * 32, "md5")])
def test_other_content_is_named(url, path, digest):
    line = refusal(download, url, path, *digest)
    assert line.startswith(f"{path}: a damaged or another file: its ")
    assert line.endswith(f"not {digest[0]}; delete it and run the same command again")
    assert refusal(download, "http://unreachable.invalid", path, *digest) == line


def test_missing_file_names_address_and_place(url, path):
    told = "cannot be fetched (HTTP Error 404: File not found); fetch it by hand and save it as"
    assert refusal(download, f"{url}s", path, SHA256) == f"{url}s: {told} {path}"
    assert list(path.parent.iterdir()) == []


def test_no_connection_names_address_and_place(path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.socket() as taken:  # bound, and never listening
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/file"
        line = refusal(download, url, path, SHA256)
    assert line.startswith(f"{url}: cannot be fetched (")
    assert line.endswith(f"refused>); fetch it by hand and save it as {path}")


@pytest.mark.parametrize("url", ["file", "http://127.0.0.1:port/file", "http://[::1/file"])
def test_malformed_addresses(url, path):
    assert refusal(download, url, path, "").startswith(f"{url}: cannot be fetched (")


NAMES = ["a", "b", "c", "d"]


@pytest.fixture
def step(tmp_path):
    """Copy four files from ``from`` to ``to``."""
    (tmp_path / "from").mkdir()
    for name in NAMES:
        (tmp_path / f"from/{name}").write_text(name)
    sources = {tmp_path / f"to/{name}": tmp_path / f"from/{name}" for name in NAMES}
    return Step("files", write_or_break, sources)


def run(root, step, workers=0, count=4):
    data = DataSet("", [], {"train": count}, lambda _: ({"train": NAMES}, [step]))
    prepare(data, root, False, workers)


def write_or_break(source, path):
    """Copy a file, and fail at one that says so."""
    if source.read_text() == "damaged":
        raise UserError(f"{source}: this one is damaged; fetch it anew")
    write_text(path, source.read_text())


@pytest.mark.parametrize("workers", [0, 2])
def test_files_and_then_the_list_are_written(tmp_path, step, workers, capsys):
    run(tmp_path, step, workers)
    assert [path.read_text() for path in step.sources] == NAMES
    assert (tmp_path / "train.txt").read_text() == "a\nb\nc\nd\n"
    assert capsys.readouterr().out == f"{tmp_path}: ready, with train.txt (4 images)\n"


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_off_run_goes_on_and_leaves_whole_files_alone(tmp_path, step, workers):
    (tmp_path / "from/c").write_text("damaged")
    with pytest.raises(UserError, match=r"from/c: this one is damaged; fetch it anew$"):
        run(tmp_path, step, workers)
    assert not (tmp_path / "train.txt").exists()
    before = (tmp_path / "to/a").stat().st_mtime_ns
    (tmp_path / "from/a").write_text("changed")
    (tmp_path / "from/c").write_text("c")
    run(tmp_path, step, workers)
    assert (tmp_path / "to/a").stat().st_mtime_ns == before
    assert [path.read_text() for path in step.sources] == NAMES
    assert sorted(path.name for path in (tmp_path / "to").iterdir()) == NAMES


def test_other_count_is_refused_before_anything_is_written(tmp_path, step):
    assert refusal(run, tmp_path, step, count=5) == (
        f"{tmp_path}: 4 images for train.txt where the data set has 5; nothing is written: "
        "complete the files and run it again"
    )
    assert not (tmp_path / "to").exists()


def test_list_of_the_users_own_is_not_overwritten(tmp_path, step):
    (tmp_path / "train.txt").write_text("mine\n")
    with pytest.raises(UserError, match=r"train\.txt: is there with other lines.*rename or"):
        run(tmp_path, step)
    assert (tmp_path / "train.txt").read_text() == "mine\n"


def test_missing_files_are_named_and_counted(tmp_path):
    (tmp_path / "a").touch()
    line = refusal(refuse_missing, (tmp_path / name for name in NAMES))
    assert line.startswith(f"{tmp_path / 'b'}: no such file (3 are missing in all); ")
    with pytest.raises(UserError, match=r"none\.txt: no such file .*unpack its archive again"):
        read_words(tmp_path / "none.txt")


HASHES = {
    "resnet18": "f37072fd",
    "resnet34": "b627a593",
    "resnet50": "0676ba61",
    "resnet101": "63fe2227",
    "resnet152": "394f9c45",
}


def test_table_of_the_readme_agrees():
    readme = (ROOT / "pretrained/README.md").read_text(encoding="utf-8")
    for name, prefix in HASHES.items():
        assert f"| `{name}.pth` | `{name}-{prefix}.pth` |" in readme
    assert all(f"| `{name}.pth` |" in readme for name in program.BY_HAND)


@pytest.fixture
def calls(monkeypatch):
    """What ``download`` is called with, instead of downloading."""
    found = []
    monkeypatch.setattr(program, "download", lambda *call: found.append(call))
    return found


def test_writes_each_name_from_the_mirror(mirror, tmp_path, monkeypatch, answer):
    prefixes = {}
    for name in ("resnet18", "resnet50"):
        prefixes[name] = hashlib.sha256(name.encode()).hexdigest()[:8]
        (mirror.folder / f"{name}-{prefixes[name]}.pth").write_bytes(name.encode())

    def weights_of(name):
        url = f"https://unreachable.invalid/models/{name}-{prefixes[name]}.pth"
        return SimpleNamespace(IMAGENET1K_V1=SimpleNamespace(url=url))

    monkeypatch.setattr(program, "get_model_weights", weights_of)
    to = tmp_path / "weights"
    words = ["weights", "resnet18", "resnet50", "--to", to, "--mirror", f"{mirror.url}/"]
    assert answer(program, *words) == [
        f"{to / name}.pth: ready, its sha256 begins with {prefix}"
        for name, prefix in prefixes.items()
    ]
    made = {file.name: file.read_bytes() for file in to.iterdir()}
    assert made == {"resnet18.pth": b"resnet18", "resnet50.pth": b"resnet50"}


@pytest.mark.parametrize("name", program.WEIGHTS)
def test_goes_from_torchvision_to_the_projects_folder(calls, answer, name):
    answer(program, "weights", name)
    url = f"https://download.pytorch.org/models/{name}-{HASHES[name]}.pth"
    assert calls == [(url, ROOT / f"pretrained/{name}.pth", HASHES[name])]


def test_missing_on_the_mirror(mirror, complaint, tmp_path):
    line = complaint(program, "weights", "resnet34", "--to", tmp_path, "--mirror", mirror.url)
    assert f"{mirror.url}/resnet34-b627a593.pth: cannot be fetched (HTTP Error 404" in line
    assert line.endswith(f"save it as {tmp_path / 'resnet34.pth'}")


def test_xception_is_fetched_by_hand(complaint, tmp_path):
    line = complaint(program, "weights", "xception65", "--to", tmp_path)
    assert line.startswith("error: xception65: there is no public address with a checksum; ")
    assert line.endswith(f"save it as {tmp_path / 'xception65.pth'}")


def test_unknown_name_is_refused_before_anything_is_fetched(complaint, calls):
    line = complaint(program, "weights", "resnet18", "resnet1O1")
    assert line == (
        "error: resnet1O1: no such weights; known are resnet18, resnet34, resnet50, resnet101, "
        "resnet152, xception65, resnet50_deep, resnet101_deep"
    )
    assert calls == []
