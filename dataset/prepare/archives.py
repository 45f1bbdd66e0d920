"""Files from the web, checked against their digest; archives, unpacked completely or not at all."""

import errno
import shutil
import sys
import tarfile
import zipfile
from collections.abc import Sequence
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple

from torch.hub import download_url_to_file

from utils.errors import UserError
from utils.files import file_digest, write_atomically

_CLOSED = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


def download(url: str, path: Path, digest: str, algorithm: str = "sha256") -> None:
    """Fetch a file, unless it is there already. An interrupted download starts over.

    ``digest`` is the first hex digits of the file's, in lower case, by an algorithm of hashlib; ''
    checks nothing.

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


class Archive(NamedTuple):
    """A tar or zip file on the web, and the folder in it that is needed."""

    name: str  # of the file below the root
    inside: str  # the folder in the archive
    folder: str  # where that folder goes, relative to the root
    address: str  # of the file, or of the page that offers it after a login
    digest: str = ""  # as ``download`` takes it
    algorithm: str = "sha256"
    login: bool = False  # whether a program cannot fetch it
    most: float = 4  # GB of its files, at most


def provide(root: Path, archives: Sequence[Archive], fetch: bool) -> None:
    """Unpack the archives whose folder is missing below the root, fetching those that are missing.

    Raises:
        UserError: an archive is missing and may not be fetched; as ``download`` and ``unpack``.
    """
    wanted = [archive for archive in archives if not (root / archive.folder).is_dir()]
    absent = [archive for archive in wanted if not (root / archive.name).exists()]
    login = any(archive.login for archive in absent)
    if absent and (login or not fetch):
        files = ", ".join(f"{archive.name} ({archive.address})" for archive in absent)
        way = "log in, fetch these by hand" if login else "add --download, or fetch by hand"
        raise UserError(f"{root}: archives are missing; {way} and put them there: {files}")
    for archive in wanted:
        path = root / archive.name
        download(archive.address, path, archive.digest, archive.algorithm)
        print(f"{path}: unpacking")
        unpack(path, archive.inside, root / archive.folder, archive.most)


def unpack(path: Path, inside: str, folder: Path, most: float = 4) -> None:
    """Unpack one folder of a tar or zip file as ``folder``, which must not exist.

    Args:
        path: the archive.
        inside: the folder in it.
        folder: where that goes; whole or not at all.
        most: GB that the files of the archive have together, at most.

    Raises:
        UserError: the archive is damaged, encrypted or lacks that folder; a member of a tar file
            would be written outside (``shutil`` leaves out such members of a zip file); its files
            are larger than ``most``, or the disk is full.
    """
    unpacked = path.with_name(f".{path.name}.unpacked")  # ``inside`` is moved when complete
    shutil.rmtree(unpacked, ignore_errors=True)  # of a run that was killed
    try:
        if path.suffix == ".zip":
            with zipfile.ZipFile(path) as archive:
                _refuse_more(path, sum(member.file_size for member in archive.infolist()), most)
            shutil.unpack_archive(path, unpacked)
        else:
            _unpack_tar(path, unpacked, most)
        folder.parent.mkdir(parents=True, exist_ok=True)
        (unpacked / inside).replace(folder)
    except UserError:
        raise
    except Exception as error:  # each format and each compression raises its own
        if isinstance(error, OSError) and error.errno in _CLOSED:
            raise UserError(
                f"{unpacked}: cannot unpack {path.name} there ({error.strerror}); make room, or "
                "name another --root"
            ) from error
        raise UserError(
            f"{path}: cannot unpack this archive ({error}); delete it and fetch it again"
        ) from error
    finally:
        shutil.rmtree(unpacked, ignore_errors=True)


def _unpack_tar(path: Path, unpacked: Path, most: float) -> None:
    """Unpack a tar file member by member: a compressed one does not tell its size before."""
    size = 0
    with tarfile.open(path) as archive:
        for member in archive:
            size += member.size
            _refuse_more(path, size, most)
            archive.extract(member, unpacked, filter="data")


def _refuse_more(path: Path, size: int, most: float) -> None:
    if size > most * 1e9:
        raise UserError(
            f"{path}: unpacks to more than the {most:g} GB that the data set has at most; delete "
            "it and fetch it again"
        )
