"""``labelmap.txt`` of CVAT and Datumaro: which colour of a mask is which class."""

import re
from pathlib import Path

from utils.colours import voc_colours
from utils.errors import UserError

_COLOUR = r"\s*(\d+)\s*,\s*(\d+)\s*,\s*(\d+)\s*(?::.*)?"  # and parts, actions
_LINE = re.compile(rf"(.+?):(?:{_COLOUR}|:[^:]*:[^:]*)")  # without a colour all colons are there


def read_labelmap(path: Path) -> dict[str, str]:
    """Read class names by colour, such as ``#ff0000``, in the order of the file.

    Lines read ``name:red,green,blue:parts:actions``; those that begin with # do not count. Datumaro
    leaves the colour out for classes that no mask shows; where all lines lack it, its masks have
    Pascal VOC's colours in the order of the lines.

    Raises:
        UserError: no such file, no line that names a class, a malformed line, a colour that is
            there twice.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path}: cannot read this label map ({error}); dataset.class_map names CVAT's "
            "labelmap.txt in dataset.root, or maps ids or colours to classes"
        ) from error
    names: dict[str, str] = {}
    bare: list[str] = []  # without a colour
    for number, line in enumerate(map(str.strip, lines), start=1):
        if not line or line.startswith("#"):
            continue
        found = _LINE.fullmatch(line)
        if found is not None and found[2] is None:
            bare.append(found[1])
            continue
        if found is None or max(channels := [int(found[place]) for place in (2, 3, 4)]) > 255:
            raise UserError(
                f"{path}:{number}: a line reads 'name:red,green,blue::', with 0 to 255, not "
                f"{line!r}"
            )
        colour = "#" + bytes(channels).hex()
        if colour in names:
            raise UserError(
                f"{path}:{number}: {found[1]} has the colour of {names[colour]}; give it another"
            )
        names[colour] = found[1]
    if not names:
        pairs = zip(voc_colours(len(bare)), bare, strict=True)
        names = {f"#{bytes(colour).hex()}": name for colour, name in pairs}
    if not names:
        raise UserError(f"{path}: names no class; a line reads 'name:red,green,blue::'")
    return names
