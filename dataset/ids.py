"""What the numbers in mask files mean: a class, ignored, or nothing."""

from collections.abc import Mapping, Sequence

import numpy as np

from utils import IGNORE
from utils.errors import UserError

UNKNOWN = -1


def id_table(
    classes: Sequence[str],
    ignore: Sequence[int] = (IGNORE,),
    class_map: Mapping[int | str, int | str | None] | None = None,
) -> np.ndarray:
    """Tell what each id that a mask file can hold means.

    Args:
        classes: names by class id.
        ignore: ids in files that count as ignored.
        class_map: id in files to class name, class id, or None for ignored; ``other`` stands for
            the ids that neither names. None: the ids in files are class ids.

    Returns:
        (65536,) int16 by id in files: a class id, 255 = ignored, -1 = without meaning.

    Raises:
        UserError: ``class_map`` names no class; an id is a class and ignored.
    """
    meaning = {id_: id_ for id_ in range(len(classes))}
    if class_map is not None:
        meaning = {id_: _class_id(value, classes) for id_, value in class_map.items()}
    table = np.full(65536, meaning.pop("other", UNKNOWN), np.int16)
    for id_ in ignore:
        if meaning.get(id_, IGNORE) != IGNORE:
            raise UserError(
                f"dataset.ignore: id {id_} is class '{classes[meaning[id_]]}' too; take it off "
                "dataset.ignore, or say with dataset.class_map which ids are which class"
            )
    table[list(meaning)] = list(meaning.values())
    table[list(ignore)] = IGNORE
    return table


def _class_id(value: int | str | None, classes: Sequence[str]) -> int:
    if value is None:
        return IGNORE
    if isinstance(value, int) and value < len(classes):
        return value
    if value in classes:
        return classes.index(value)
    known = ", ".join(classes)
    raise UserError(f"dataset.class_map: {value!r} is no class; there are {known} (null: ignored)")
