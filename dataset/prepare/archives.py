"""Public archives: fetched once, unpacked completely or not at all."""

import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple, TypeVar

from tqdm import tqdm

from dataset.prepare.download import download
from utils.errors import UserError

T = TypeVar("T")


class Archive(NamedTuple):
    """A tar or zip file on the web, and the folder in it that is needed.

    Attributes:
        name: of the file below the root.
        inside: the folder in the archive; nothing else is unpacked.
        folder: where that folder goes, relative to the root.
        address: of the file, or of the page that offers it after a login.
        digest, algorithm: as ``download`` takes them.
        login: whether a program cannot fetch it.
    """

    name: str
    inside: str
    folder: str
    address: str
    digest: str = ""
    algorithm: str = "sha256"
    login: bool = False


def provide(root: Path, archives: Sequence[Archive], fetch: bool) -> None:
    """Make sure that the folders of these archives are below the root.

    A folder that is there is left as it is; else the archive is unpacked, and fetched first if it
    is not in the root.

    Args:
        root: folder of the data set.
        archives: what has to be there.
        fetch: whether archives may be fetched from the web.

    Raises:
        UserError: an archive is missing and may not be fetched; as ``download`` and ``unpack``.
    """
    wanted = [archive for archive in archives if not (root / archive.folder).is_dir()]
    absent = [archive for archive in wanted if not (root / archive.name).exists()]
    if any(archive.login or not fetch for archive in absent):
        folders = ", ".join(archive.folder for archive in absent)
        files = ", ".join(f"{archive.name} ({archive.address})" for archive in absent)
        login = any(archive.login for archive in absent)
        way = "log in, since no program can," if login else "add --download, or fetch by hand"
        raise UserError(f"{root}: {folders} missing; {way} and put there: {files}")
    for archive in wanted:
        download(archive.address, root / archive.name, archive.digest, archive.algorithm)
        unpack(root / archive.name, archive.inside, root / archive.folder)


def unpack(path: Path, inside: str, folder: Path) -> None:
    """Unpack one folder of an archive; after an error or a kill nothing counts as unpacked.

    Args:
        path: a tar file, compressed or not, or a zip file.
        inside: the folder in the archive.
        folder: where it goes; must not exist.

    Raises:
        UserError: a damaged archive; one without that folder; a member of a tar file that would
            be written or linked outside. (Zip files: such names lose what leads outside.)
    """
    gathered = path.with_name(f".{path.name}.unpacked")
    shutil.rmtree(gathered, ignore_errors=True)

    def chosen(members: Iterable[T], name: Callable[[T], str]) -> Iterator[T]:
        for member in tqdm(members, path.name, disable=None, leave=False):
            if PurePosixPath(name(member)).is_relative_to(inside):
                yield member

    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                archive.extractall(gathered, chosen(archive.namelist(), str))
        else:
            with tarfile.open(path) as archive:
                members = chosen(archive, lambda member: member.name)
                archive.extractall(gathered, members, filter="data")
        if not (gathered / inside).is_dir():
            raise KeyError(f"it holds no {inside}")
        folder.parent.mkdir(parents=True, exist_ok=True)
        (gathered / inside).replace(folder)
    except _DAMAGE as error:
        raise UserError(
            f"{path}: cannot unpack this archive ({error}); delete it and fetch it again"
        ) from error
    finally:
        shutil.rmtree(gathered, ignore_errors=True)


_DAMAGE = (
    *(tarfile.TarError, zipfile.BadZipFile, zlib.error),
    *(EOFError, OSError, KeyError, NotImplementedError, RuntimeError),
)
