"""A list of images: read its lines, and write them."""

import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath

from dataset.catalog import Kind
from dataset.splits.samples import Sample
from utils.errors import UserError
from utils.files import write_text

LONGEST = 255  # bytes of a file's name, on the common file systems


def read_list(path: Path, root: Path, kind: Kind) -> list[Sample]:
    """Read ``image [mask]`` lines, or U2PL's bare ids; blank lines do not count.

    A path that holds spaces stands in double quotes.

    Args:
        path: the list; a missing final newline is fine.
        root: folder that the paths in it are relative to.
        kind: tells where bare ids lie.

    Raises:
        UserError: no list, no lines, a malformed or repeated line, a path that leaves the root.
    """
    return samples_of(read_lines(path), path, root, kind)


def read_lines(path: Path) -> list[str]:
    """Read the lines of a text file, whatever ends them; a byte order mark is no part of them.

    Raises:
        UserError: no such file, or no UTF-8 text.
    """
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot read this list ({error})") from error


def samples_of(
    lines: Iterable[str], path: Path, root: Path, kind: Kind | None, slashes: bool = False
) -> list[Sample]:
    """Parse the lines of ``path`` as ``read_list`` does; without a kind, bare ids are refused."""
    samples: dict[PurePosixPath, Sample] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        sample = read_line(line, f"{path}:{number}", root, kind, slashes)
        key = PurePosixPath(sample.name).with_suffix("")
        if key in samples and samples[key].name == sample.name:
            raise UserError(f"{path}:{number}: {sample.name} is listed twice; remove one line")
        if key in samples:
            raise UserError(
                f"{path}:{number}: {sample.name} and {samples[key].name} would share one predicted "
                "mask; rename one"
            )
        samples[key] = sample
    if not samples:
        raise UserError(f"{path}: this list is empty; it needs an image a line")
    return list(samples.values())


def read_line(
    line: str, place: str, root: Path, kind: Kind | None, slashes: bool = False
) -> Sample:
    """Parse ``image [mask]`` or a bare id.

    Args:
        line: a line of a list.
        place: names it in errors.
        root: folder that paths are relative to.
        kind: tells where bare ids lie.
        slashes: whether paths may begin with a slash, which is left out.

    Raises:
        UserError: another number of words, a path that leaves the root or names nothing, or a
            bare id and no kind that tells where its files lie.
    """
    words = _words(line, place)
    if slashes:
        words = [word.lstrip("/") or word for word in words]
    first, last = PurePosixPath(words[0]), PurePosixPath(words[-1])
    if len(words) > 2 or (first.name and not first.suffix and last.suffix):
        raise UserError(
            f"{place}: a line reads 'image [mask]', not {line!r}; paths with spaces stand in "
            "double quotes"
        )
    if len(words) == 1 and not PurePosixPath(words[0]).suffix:
        if kind is None:
            raise UserError(
                f"{place}: {words[0]} is a bare id; name the data set that tells where its files "
                "lie (import --kind NAME, make --config FILE)"
            )
        words = [kind.image_pattern.format(words[0]), kind.mask_pattern.format(words[0])]
    for word in words:
        if PurePosixPath(word).is_absolute() or ".." in PurePosixPath(word).parts:
            raise UserError(
                f"{place}: {word} leaves the data root {root}; paths are relative to it"
            )
        parts = PurePosixPath(word).parts
        if "\0" in word or not parts or max(len(part.encode()) for part in parts) > LONGEST:
            raise UserError(f"{place}: {word[:LONGEST]!r} names no file; correct the line")
    name = str(PurePosixPath(words[0]))  # one spelling: a//b and a/./b are a/b
    mask = root / words[1] if len(words) == 2 else None
    return Sample(name, root / name, mask, None if kind is None else kind.ids)


def line_of(sample: Sample, root: Path) -> str:
    """Return the line that ``read_line`` reads as this sample."""
    files = [sample.name]
    if sample.mask is not None:
        files.append(sample.mask.relative_to(root).as_posix())
    return " ".join(f'"{file}"' if file.split() != [file] else file for file in files)


def _words(line: str, place: str) -> list[str]:
    if '"' not in line:
        return line.split()  # COCO's lists are long, and shlex is slow
    lexer = shlex.shlex(line, posix=True)
    lexer.whitespace_split, lexer.quotes, lexer.escape, lexer.commenters = True, '"', "", ""
    try:
        return list(lexer)
    except ValueError as error:
        raise UserError(f"{place}: a double quote is not closed in {line!r}") from error


def write_lists(folder: Path, lists: Mapping[str, Sequence[str]]) -> None:
    """Write lists, none if one may not be; a list that is there is never replaced by another.

    Args:
        folder: gets ``<name>.txt`` for every name.
        lists: lines by name.

    Raises:
        UserError: a list is there with other lines, or the place is not to be written to.
    """
    texts = {
        folder / f"{name}.txt": "".join(f"{line}\n" for line in lines)
        for name, lines in lists.items()
    }
    for path, text in texts.items():
        if path.is_file() and path.read_bytes() != text.encode():
            raise UserError(
                f"{path}: is there with other lines, and a run may depend on them; name another "
                "--out, or remove it"
            )
    for path, text in texts.items():
        write_text(path, text)
