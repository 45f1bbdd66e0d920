"""Checkpoints on the Hugging Face hub: ``hf:owner/name``."""

from difflib import get_close_matches
from pathlib import Path

import huggingface_hub as hub

from utils.errors import UserError

_HUB = "hf:"  # before the name of a repository


def find_checkpoint(source: str | Path) -> Path:
    """Return where a checkpoint is, downloading a repository of the hub.

    Args:
        source: a checkpoint's path; or ``hf:owner/name``. Nothing else is looked for on the hub.

    Raises:
        UserError: no such file, and what is nearest to it; or the hub gives no such repository.
    """
    repository = str(source).removeprefix(_HUB)
    if repository == str(source):
        path = Path(source)
        try:
            if path.is_file() or (path / "config.json").is_file():
                return path
            raise UserError(f"{path}: no such checkpoint; {_advice(path)}")
        except OSError as error:  # a name that is too long, a folder that is closed
            raise UserError(f"{path}: cannot be looked for ({error.strerror})") from error
    try:
        files = ["config.json", "model.safetensors"]
        return Path(hub.snapshot_download(repository, allow_patterns=files))
    except Exception as error:  # the hub's own, and those of whatever library it connects by
        raise UserError(
            f"{source}: the Hugging Face hub gives no such repository ({_line(error)}); check its "
            "name, the connection, and 'hf auth login' if it is private"
        ) from error


def upload(folder: Path, repository: str, private: bool) -> str:
    """Upload a folder to a repository, which is made if it does not exist.

    Returns:
        The address of the commit.

    Raises:
        UserError: the hub cannot be reached, or refuses.
    """
    try:
        hub.create_repo(repository, private=private, exist_ok=True)
        return str(hub.upload_folder(repo_id=repository, folder_path=str(folder)))
    except Exception as error:  # the hub's own, and those of whatever library it connects by
        raise UserError(
            f"{repository}: upload failed ({_line(error)}); check the connection, the name and "
            "'hf auth login'"
        ) from error


def _advice(path: Path) -> str:
    """Say what to name in place of a path that is no checkpoint: the nearest one there is."""
    inside = sorted(path.glob("[146]_*/checkpoint.pth")) or sorted(path.glob("checkpoint.pth"))
    if inside:
        return f"name {inside[-1]}"
    place = path
    while not place.exists():
        missing, place = place, place.parent
    if place != path and place.is_dir():
        names = [entry.name for entry in place.iterdir()]
        if close := get_close_matches(missing.name, names, n=1):
            return f"{place} has '{close[0]}', and no '{missing.name}'"
    return f"name a checkpoint.pth of a run, or {_HUB}owner/name on the Hugging Face hub"


def _line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
