"""Public archives: fetched once, unpacked completely or not at all."""

import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from dataset.prepare.download import download
from utils.errors import UserError


class Archive(NamedTuple):
    """A tar or zip file on the web, and the folder in it that is needed."""

    name: str  # of the file below the root
    inside: str  # the folder in the archive
    folder: str  # where that folder goes, relative to the root
    address: str  # of the file, or of the page that offers it after a login
    digest: str = ""  # as ``download`` takes it
    algorithm: str = "sha256"
    login: bool = False  # whether a program cannot fetch it


def provide(root: Path, archives: Sequence[Archive], fetch: bool) -> None:
    """Unpack the archives whose folder is missing below the root, fetching those that are missing.

    Raises:
        UserError: an archive is missing and may not be fetched; as ``download`` and ``unpack``.
    """
    wanted = [archive for archive in archives if not (root / archive.folder).is_dir()]
    absent = [archive for archive in wanted if not (root / archive.name).exists()]
    login = any(archive.login for archive in absent)
    if absent and (login or not fetch):
        folders = ", ".join(archive.folder for archive in absent)
        files = ", ".join(f"{archive.name} ({archive.address})" for archive in absent)
        way = "log in, since no program can," if login else "add --download, or fetch by hand"
        raise UserError(f"{root}: {folders} missing; {way} and put there: {files}")
    for archive in wanted:
        path = root / archive.name
        download(archive.address, path, archive.digest, archive.algorithm)
        print(f"{path}: unpacking")
        unpack(path, archive.inside, root / archive.folder)


def unpack(path: Path, inside: str, folder: Path) -> None:
    """Unpack one folder of a tar or zip file as ``folder``, which must not exist.

    Raises:
        UserError: a damaged archive, one without that folder, or a tar file with a member outside
            (``shutil`` leaves out such members of a zip file).
    """
    unpacked = path.with_name(f".{path.name}.unpacked")  # ``inside`` is moved when complete
    safe = {} if path.suffix == ".zip" else {"filter": "data"}
    try:
        shutil.unpack_archive(path, unpacked, **safe)
        folder.parent.mkdir(parents=True, exist_ok=True)
        (unpacked / inside).replace(folder)
    except (OSError, EOFError, tarfile.TarError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(
            f"{path}: cannot unpack this archive ({error}); delete it and fetch it again"
        ) from error
    finally:
        shutil.rmtree(unpacked, ignore_errors=True)
