import hashlib
import random
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from dataset.prepare import download as module
from dataset.prepare.download import download
from utils.errors import UserError

BODY = random.Random(0).randbytes(200_000)  # several blocks
PREFIX = hashlib.sha256(BODY).hexdigest()[:8]


class Server(ThreadingHTTPServer):
    """Serves ``body`` under /file; tests change how, and read which ranges were ``asked`` for."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.body, self.asked, self.ended = BODY, [], threading.Event()
        self.sends = None  # bytes of an answer's body, of which all are announced
        self.stalls, self.takes_ranges, self.shift = False, True, 0

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/file"


class Handler(BaseHTTPRequestHandler):
    timeout = 5

    def do_GET(self):
        server, asked = self.server, self.headers["Range"]
        server.asked.append(asked)
        ranged, size = asked and server.takes_ranges, len(server.body)
        start = int(asked[len("bytes=") : -1]) if ranged else 0
        if self.path != "/file" or (ranged and start >= size):
            self.send_error(416 if self.path == "/file" else 404)
            return
        start = max(start - server.shift, 0)
        self.send_response(206 if ranged else 200)
        self.send_header("Content-Length", str(size - start))
        if ranged:
            self.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
        self.end_headers()
        self.wfile.write(server.body[start:][: server.sends])
        if server.stalls:
            server.ended.wait(5)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield server
        server.ended.set()
        server.shutdown()
        thread.join(5)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "made" / "weights.pth"


@pytest.fixture
def partial(path):
    return path.with_name(".weights.pth.partial")


def refusal(url, path, prefix=PREFIX):
    with pytest.raises(UserError) as refused:
        download(url, path, prefix)
    return str(refused.value)


def keep(partial, content):
    partial.parent.mkdir()
    partial.write_bytes(content)


def test_whole_file(server, path):
    download(server.url, path, PREFIX)
    assert path.read_bytes() == BODY
    assert list(path.parent.iterdir()) == [path]
    assert server.asked == [None]


def test_other_digests_are_checked(server, path):
    download(server.url, path, hashlib.md5(BODY).hexdigest(), "md5")
    with pytest.raises(UserError, match="another file is there: its md5 begins with"):
        download(server.url, path, "0" * 32, "md5")


def test_empty_digest_checks_nothing(server, path):
    download(server.url, path, "")
    path.write_bytes(b"mine")
    download(server.url, path, "")
    assert path.read_bytes() == b"mine"
    assert server.asked == [None]


def test_truncated_file_is_taken_up_again(server, path, partial):
    server.sends = 70_001
    line = refusal(server.url, path)
    assert f"{server.url}: the connection ended early (" in line
    assert line.endswith("the same command goes on from there")
    assert list(path.parent.iterdir()) == [partial]
    assert partial.read_bytes() == BODY[:70_001]
    refusal(server.url, path)  # 70,001 bytes more
    server.sends = None
    download(server.url, path, PREFIX)
    assert path.read_bytes() == BODY
    assert list(path.parent.iterdir()) == [path]
    assert server.asked == [None, "bytes=70001-", "bytes=140002-"]


def test_silent_server_is_left_and_the_file_kept(server, path, partial, monkeypatch):
    monkeypatch.setattr(module, "TIMEOUT", 0.2)
    server.sends, server.stalls = 2 * 65_536, True
    assert "the connection ended early (timed out)" in refusal(server.url, path)
    assert partial.read_bytes() == BODY[: 2 * 65_536]


def test_server_without_ranges_sends_all_again(server, path, partial):
    keep(partial, BODY[:1000])
    server.takes_ranges = False
    download(server.url, path, PREFIX)
    assert path.read_bytes() == BODY
    assert server.asked == ["bytes=1000-"]


@pytest.mark.parametrize("length", [len(BODY), len(BODY) + 7])
def test_partial_as_long_as_the_file_or_longer_starts_over(server, path, partial, length):
    keep(partial, bytes(length))
    download(server.url, path, PREFIX)
    assert path.read_bytes() == BODY
    assert server.asked == [f"bytes={length}-", None]


def test_range_that_begins_elsewhere_starts_over(server, path, partial):
    keep(partial, BODY[:1000])
    server.shift = 10
    download(server.url, path, PREFIX)
    assert path.read_bytes() == BODY
    assert server.asked == ["bytes=1000-", None]


@pytest.mark.parametrize("kept", [b"", b"an", b"xx"])
def test_wrong_content_leaves_nothing(server, path, partial, kept):
    keep(partial, kept)
    server.body = b"another file"
    found = hashlib.sha256(kept + b"another file"[len(kept) :]).hexdigest()[:8]
    assert f"begins with {found}, not {PREFIX}; it is removed" in refusal(server.url, path)
    assert not any(path.parent.iterdir())


def test_missing_file_names_address_and_place(server, path):
    url = f"{server.url}s"
    told = "cannot be fetched (HTTP Error 404: Not Found); fetch it by hand and save it as"
    assert refusal(url, path) == f"{url}: {told} {path}"
    assert list(path.parent.iterdir()) == []


def test_no_connection_names_address_and_place(path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.socket() as taken:  # bound, and never listening
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/file"
        line = refusal(url, path)
    assert line.startswith(f"{url}: cannot be fetched (")
    assert line.endswith(f"refused); fetch it by hand and save it as {path}")


def test_file_that_is_there_is_not_asked_for(server, path):
    keep(path, BODY)
    before = path.stat()
    download(server.url, path, PREFIX)
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    assert server.asked == []


def test_other_file_under_the_name_is_kept_and_named(server, path):
    keep(path, b"mine")
    found = hashlib.sha256(b"mine").hexdigest()[:8]
    line = refusal(server.url, path)
    assert line.startswith(f"{path}: another file is there: its sha256 begins with {found}, not")
    assert line.endswith(f"not {PREFIX}; delete it and run the same command again")
    assert path.read_bytes() == b"mine"
    assert server.asked == []


def test_folder_under_the_name(server, path):
    path.mkdir(parents=True)
    assert f"{path}: cannot read this file (Is a directory)" in refusal(server.url, path)
    assert server.asked == []


@pytest.mark.parametrize("url", ["file:///etc/hostname", "ftp://127.0.0.1/file", "file"])
def test_addresses_of_other_kinds(url, path):
    assert refusal(url, path) == f"{url}: not an http or https address"
    assert not path.parent.exists()


@pytest.mark.parametrize("url", ["http://127.0.0.1:port/file", "http://[::1/file", "http://"])
def test_addresses_of_odd_form(url, path):
    assert refusal(url, path).startswith(f"{url}: cannot be fetched (")
