"""Files from the web, checked against their digest."""

import sys
from http.client import HTTPException
from pathlib import Path

from torch.hub import download_url_to_file

from utils.errors import UserError
from utils.files import file_digest, write_atomically


def download(url: str, path: Path, digest: str, algorithm: str = "sha256") -> None:
    """Fetch a file, unless it is there already. An interrupted download starts over.

    Args:
        url: of the file.
        path: where the file goes; its folder is made.
        digest: first hex digits of the file's digest, in lower case; '' checks nothing.
        algorithm: of the digest, a name of hashlib.

    Raises:
        UserError: no connection or no such file; a file of another digest, fetched or there
            already; a place that cannot be written.
    """

    def fetch(partial: Path) -> None:
        try:
            download_url_to_file(url, str(partial), progress=sys.stderr.isatty())
        except (OSError, HTTPException, ValueError) as error:  # ValueError: malformed addresses
            raise UserError(
                f"{url}: cannot be fetched ({error}); fetch it by hand and save it as {path}"
            ) from error

    if not path.exists():
        write_atomically(path, fetch)
    found = file_digest(path, algorithm)[: len(digest)]
    if found != digest:
        raise UserError(
            f"{path}: a damaged or another file: its {algorithm} begins with {found}, not "
            f"{digest}; delete it and run the same command again"
        )
