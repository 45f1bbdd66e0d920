"""Public archives: fetched once, unpacked safely, in place whole or not at all."""

import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import IO, NamedTuple

from tqdm import tqdm

from dataset.prepare.download import download
from utils.errors import UserError
from utils.files import write_atomically


class Archive(NamedTuple):
    """A tar or zip file on the web, and the folder in it that counts.

    Attributes:
        name: what the file is called below the root.
        inside: the folder in the archive; all else in it stays packed.
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
    """Make sure that the folders of these archives lie below the root.

    A folder that is there is taken as it is; else the archive is unpacked, if it lies in the root,
    and fetched first, if it does not.

    Args:
        root: folder of the data set.
        archives: what has to be there.
        fetch: whether archives may be fetched from the web.

    Raises:
        UserError: an archive that is nowhere and may not or cannot be fetched, or is not the one
            that its digest tells; one that is damaged, or that would write outside its folder.
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
    """Unpack one folder of an archive.

    Only the bytes of plain files are taken: no links, devices, owners or permissions. They gather
    in ``.<name>.unpacked.partial`` beside the archive, where a later call goes on after a killed
    one, and become ``folder`` when all of them are there.

    Args:
        path: a tar file, compressed or not, or a zip file.
        inside: the folder in the archive.
        folder: what it becomes; must not exist.

    Raises:
        UserError: a damaged archive; one without that folder; a member that would leave the
            archive's own folder, or is neither file nor folder.
    """
    gathered = path.with_name(f".{path.name}.unpacked.partial").resolve()

    def refusal(reason: str) -> UserError:
        shutil.rmtree(gathered, ignore_errors=True)
        return UserError(f"{path}: {reason}; delete it and fetch it anew")

    try:
        for member in tqdm(_members(path), desc=path.name, disable=None, leave=False):
            target = (gathered / member.name).resolve()
            if not target.is_relative_to(gathered):
                raise refusal(f"its member {member.name} would be written outside")
            if not target.is_relative_to(gathered / inside):
                continue
            if not member.plain:
                raise refusal(f"its member {member.name} is a link or a device")
            if not target.exists():
                write_atomically(target, partial(_copy, member))
    except _DAMAGE as error:
        raise refusal(f"cannot unpack this archive ({error})") from error
    if not (gathered / inside).is_dir():
        raise refusal(f"holds no {inside}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    (gathered / inside).replace(folder)
    shutil.rmtree(gathered)


_DAMAGE = (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError)


class _Member(NamedTuple):
    """What an archive holds, folders aside."""

    name: str
    plain: bool  # a file, neither link nor device
    open: Callable[[], IO[bytes]]


def _copy(member: _Member, path: Path) -> None:
    with member.open() as source, path.open("wb") as file:
        shutil.copyfileobj(source, file)


def _members(path: Path) -> Iterator[_Member]:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                kind = stat.S_IFMT(info.external_attr >> 16)  # 0 where the writer had no Unix modes
                if not info.is_dir():
                    plain = kind in (0, stat.S_IFREG)
                    yield _Member(info.filename, plain, partial(archive.open, info))
        return
    with tarfile.open(path) as archive:
        for member in archive:
            if not member.isdir():
                yield _Member(member.name, member.isreg(), partial(archive.extractfile, member))
