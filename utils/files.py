"""Files that are whole or absent."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from utils.errors import UserError


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Write beside ``path``, then rename: a killed run leaves the old file or the new one.

    Args:
        path: where the file goes; its folder is made.
        write: writes the file it is handed.

    Raises:
        UserError: the disk is full, or the place is not to be written to.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(partial)
        partial.replace(path)
    except OSError as error:
        raise UserError(
            f"{path}: cannot write this file ({error.strerror or error}); name another place"
        ) from error


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    write_atomically(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON atomically."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """Read JSON."""
    return json.loads(path.read_text(encoding="utf-8"))
