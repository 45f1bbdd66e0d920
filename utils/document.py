"""Sections of a Markdown file that programs write, between marks; the rest is left as it is."""

import re
from pathlib import Path

from utils.errors import UserError
from utils.files import write_atomically


def put_section(file: Path, name: str, text: str) -> None:
    """Write a study's section, in place of an earlier one of this name or at the end of the file.

    Line ends are those of the file.

    Args:
        file: is made if it does not exist.
        name: of the study.
        text: Markdown, lines that end in a newline.

    Raises:
        UserError: as ``check_section``, or the file cannot be written.
    """
    there, place = _find(file, name)
    begin, end = _marks(name)
    section = f"{begin}\n{text}{end}\n"
    before, after = there[: place.start], there[place.stop :]
    if not place and before:  # a new one: after a blank line
        section = ("\n" if before.endswith("\n") else "\n\n") + section
    if "\r\n" in there:
        section = section.replace("\n", "\r\n")
    content = (before + section + after).encode()
    write_atomically(file, lambda partial: partial.write_bytes(content))


def check_section(file: Path, name: str) -> None:
    """Tell before any work whether ``put_section`` can find a section's place.

    Raises:
        UserError: the file cannot be read as UTF-8; a mark is there without its other one, or
            several sections of this name are.
    """
    _find(file, name)


def _find(file: Path, name: str) -> tuple[str, range]:
    """Return a file's text, and where a section is in it; an empty place at the end if nowhere."""
    try:
        there = file.read_bytes().decode() if file.exists() else ""
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot read this as UTF-8 text ({error}); name another") from None
    found = [
        [
            match.span()
            for match in re.finditer(rf"^{re.escape(mark)}[ \t]*\r?(?:\n|\Z)", there, re.M)
        ]
        for mark in _marks(name)
    ]
    (begins, ends), marks = found, " and ".join(_marks(name))
    if not begins and not ends:
        return there, range(len(there), len(there))
    if len(begins) != 1 or len(ends) != 1 or begins[0] > ends[0]:
        line = there.count("\n", 0, min(begins + ends)[0]) + 1
        raise UserError(
            f"{file}:{line}: {marks} do not stand once each, in this order; correct or remove them"
        )
    return there, range(begins[0][0], ends[0][1])


def _marks(name: str) -> tuple[str, str]:
    return f"<!-- study {name} -->", f"<!-- end of study {name} -->"
