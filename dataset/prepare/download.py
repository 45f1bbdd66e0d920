"""Files from the web: checked against their digest, taken up where they were interrupted."""

from collections.abc import Iterator
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from tqdm import tqdm

from utils.errors import UserError
from utils.files import file_digest, write_atomically

TIMEOUT = 30.0  # seconds without a word from the server
_BLOCK = 1 << 16  # bytes


def download(url: str, path: Path, digest: str, algorithm: str = "sha256") -> None:
    """Fetch a file, unless it is there already.

    What has arrived stays in ``.<name>.partial`` when the connection or the program ends early, and
    the next call goes on from there if the server can. A file under its own name is whole.

    Args:
        url: http or https address.
        path: where the file goes; its folder is made.
        digest: first hex digits of the file's digest, in lower case; none of them where nobody
            publishes one, then nothing is checked.
        algorithm: of the digest, a name of hashlib.

    Raises:
        UserError: an address of another kind; no connection, no such file, or an early end; a file
            whose digest begins otherwise, fetched or there already; a place that cannot be written.
    """
    if not url.lower().startswith(("http://", "https://")):
        raise UserError(f"{url}: not an http or https address")
    if path.exists() and not digest:
        return
    if path.exists():
        found = file_digest(path, algorithm)[: len(digest)]
        if found == digest:
            return
        raise UserError(
            f"{path}: another file is there: its {algorithm} begins with {found}, not {digest}; "
            "delete it and run the same command again"
        )

    def fetch_and_check(partial: Path) -> None:
        _fetch(url, path, partial)
        found = file_digest(partial, algorithm)[: len(digest)]
        if found != digest:
            partial.unlink()
            raise UserError(
                f"{url}: the file that came is damaged or another: its {algorithm} begins with "
                f"{found}, not {digest}; it is removed, so run the same command again"
            )

    write_atomically(path, fetch_and_check)


def _fetch(url: str, path: Path, partial: Path) -> None:
    """Complete ``partial``, or write it anew where the server cannot go on from its end."""
    start = partial.stat().st_size if partial.exists() else 0
    with _open(url, path, start) as response:
        if response.status != 206:
            start = 0
        total = None if response.length is None else start + response.length
        bar = tqdm(
            desc=path.name,
            total=total,
            initial=start,
            unit="B",
            unit_scale=True,
            disable=None,
            leave=False,
        )
        with bar, partial.open("ab" if start else "wb") as file:
            for block in _blocks(response, url):
                file.write(block)
                bar.update(len(block))


def _open(url: str, path: Path, start: int) -> HTTPResponse:
    """Ask for the file from byte ``start`` on, and for all of it if that cannot be had."""
    headers = {"User-Agent": "cisc-r"} | ({"Range": f"bytes={start}-"} if start else {})
    try:
        response = urlopen(Request(url, headers=headers), timeout=TIMEOUT)
    except HTTPError as error:
        error.close()
        if start and error.code == 416:  # the file ends before that
            return _open(url, path, 0)
        raise _cannot_fetch(url, path, error) from error
    except (OSError, HTTPException, ValueError) as error:  # ValueError: an address of odd form
        raise _cannot_fetch(url, path, getattr(error, "reason", error)) from error
    sent = response.headers.get("Content-Range", "")
    if start and response.status == 206 and not sent.startswith(f"bytes {start}-"):
        response.close()
        return _open(url, path, 0)
    return response


def _cannot_fetch(url: str, path: Path, reason: object) -> UserError:
    return UserError(f"{url}: cannot be fetched ({reason}); fetch it by hand and save it as {path}")


def _blocks(response: HTTPResponse, url: str) -> Iterator[bytes]:
    """Read to the end; an end before the announced length is an error too."""
    try:
        while block := response.read(_BLOCK):
            yield block
        if response.length:
            raise ConnectionError(f"{response.length} bytes are missing")
    except (OSError, HTTPException) as error:
        raise UserError(
            f"{url}: the connection ended early ({error}); the same command goes on from there"
        ) from error
