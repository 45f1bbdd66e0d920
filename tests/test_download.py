import hashlib
import socket

import pytest

from dataset.prepare.archives import download
from utils.errors import UserError

BODY = b"weights" * 20_000
SHA256, MD5 = hashlib.sha256(BODY).hexdigest(), hashlib.md5(BODY).hexdigest()


@pytest.fixture
def url(mirror):
    (mirror.folder / "file").write_bytes(BODY)
    return f"{mirror.url}/file"


@pytest.fixture
def path(tmp_path):
    return tmp_path / "made" / "weights.pth"


def refusal(*arguments):
    with pytest.raises(UserError) as refused:
        download(*arguments)
    return str(refused.value)


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
    line = refusal(url, path, *digest)
    assert line.startswith(f"{path}: a damaged or another file: its ")
    assert line.endswith(f"not {digest[0]}; delete it and run the same command again")
    assert refusal("http://unreachable.invalid", path, *digest) == line


def test_missing_file_names_address_and_place(url, path):
    told = "cannot be fetched (HTTP Error 404: File not found); fetch it by hand and save it as"
    assert refusal(f"{url}s", path, SHA256) == f"{url}s: {told} {path}"
    assert list(path.parent.iterdir()) == []


def test_no_connection_names_address_and_place(path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.socket() as taken:  # bound, and never listening
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/file"
        line = refusal(url, path, SHA256)
    assert line.startswith(f"{url}: cannot be fetched (")
    assert line.endswith(f"refused>); fetch it by hand and save it as {path}")


@pytest.mark.parametrize("url", ["file", "http://127.0.0.1:port/file", "http://[::1/file"])
def test_malformed_addresses(url, path):
    assert refusal(url, path, "").startswith(f"{url}: cannot be fetched (")
