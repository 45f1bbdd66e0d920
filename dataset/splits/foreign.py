"""Take in the lists and query indices of ST++, CISC-R, UniMatch and U2PL."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from dataset.catalog import Kind
from dataset.lists import (
    Sample,
    Splits,
    line_of,
    overlaps,
    read_line,
    read_lines,
    samples_of,
    write_lists,
)
from utils.errors import UserError


def import_lists(lists: Mapping[str, Path], folder: Path, kind: Kind | None = None) -> list[str]:
    """Write lists of other projects as this one reads them. The images need not be there.

    Args:
        lists: files by ``labeled``, ``unlabeled``, ``val``; some are enough.
        folder: gets ``<name>.txt``.
        kind: tells where the images and masks of bare ids lie.

    Returns:
        What was done, in lines; overlaps among them.

    Raises:
        UserError: a list is empty or malformed, or as ``write_lists``.
    """
    splits = Splits([], [], [])._replace(
        **{name: read_foreign(path, kind) for name, path in lists.items()}
    )
    splits = splits._replace(unlabeled=[s._replace(mask=None) for s in splits.unlabeled])
    written = {name: [line_of(s, Path()) for s in getattr(splits, name)] for name in lists}
    write_lists(folder, written)
    report = [f"{folder / name}.txt: {len(lines)} images" for name, lines in written.items()]
    return report + [overlap.line for overlap in overlaps(splits)]


def read_foreign(path: Path, kind: Kind | None) -> list[Sample]:
    """Read a list as ``read_list`` does, whose paths may begin with a slash."""
    lines = read_lines(path)
    if not any(map(str.strip, lines)):
        raise UserError(
            f"{path}: this list is empty, as 12 lists of ST++ and CISC-R are published; take "
            "another, or 'python -m dataset.splits make' one"
        )
    return samples_of(lines, path, Path(), kind, slashes=True)


def read_query_index(path: Path, root: Path, kind: Kind) -> list[Sample]:
    """Read the images of a query index, of any class, each once.

    Args:
        path: a JSON object from class to images, as stage 3 leaves it; or a folder of ``*.txt``,
            one a class; or one list. An image is a line of a list, or its first word.
        root: folder that the paths are relative to.
        kind: tells where bare ids lie.

    Raises:
        UserError: none of these, no image at all, or a malformed line.
    """
    samples: dict[str, Sample] = {}
    for place, line in _index_lines(path):
        if path.suffix == ".json" and '"' not in line and _is_file(root / line):
            line = f'"{line}"'  # a name by itself, as stage 3 leaves it, may hold spaces
        sample = read_line(line, place, root, kind, slashes=True)
        samples[sample.name] = sample
    if not samples:
        raise UserError(f"{path}: this query index lists no image; name another")
    return list(samples.values())


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name too long for a file
        return False


def _index_lines(path: Path) -> Iterator[tuple[str, str]]:
    """Yield every line that is not blank, after its place."""
    if path.suffix == ".json":
        lists = _read_object(path)
    elif path.is_dir():
        lists = {file: read_lines(file) for file in sorted(path.glob("*.txt"))}
    else:
        lists = {path: read_lines(path)}
    for place, lines in lists.items():
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield f"{place}:{number}", line


def _read_object(path: Path) -> dict[str, list[str]]:
    try:
        lists = json.loads(path.read_text(encoding="utf-8-sig"))
        json.dumps(lists, ensure_ascii=False).encode()  # half a surrogate pair names no file
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot read this query index ({error})") from error
    if not isinstance(lists, dict) or not all(
        isinstance(lines, list) and all(isinstance(line, str) for line in lines)
        for lines in lists.values()
    ):
        raise UserError(f"{path}: a query index reads {{class: [image, ...], ...}}")
    return {f"{path}: {name}": lines for name, lines in lists.items()}
