"""Ends an import where a user's own ``utils`` or ``dataset`` hides this project's, in one line."""

from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def refuse_hidden(name: str) -> None:
    """Raise an ``ImportError`` if a package of this project is another one when it is imported."""
    found = find_spec(name)
    origin = Path((found and found.origin) or "").resolve()
    if origin.parent != ROOT / name:
        raise ImportError(
            f"{origin} is imported as '{name}' in place of {ROOT / name}; rename your own module, "
            f"or begin with: import sys; sys.path.insert(0, '{ROOT}')"
        )


refuse_hidden("utils")
refuse_hidden("dataset")
