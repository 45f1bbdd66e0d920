"""Whether what a run folder holds and what shall go on there are one run."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from utils.config.reading import read_config
from utils.config.schema import Config
from utils.device import Device
from utils.distributed import world
from utils.errors import UserError
from utils.files import read_json

# They change no result. Of precision and device it is what 'auto' comes to that counts.
_FREE_KEYS = (
    *("workers", "cache", "outdir", "checkpoint_every", "on_nonfinite"),
    *("precision", "device"),
)


def refuse_other_config(folder: Path, config: Config) -> None:
    """Compare settings with those of the run in a folder.

    Raises:
        UserError: keys that can change a result differ, or the folder's ``config.yaml`` is spoilt.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        raise UserError(
            f"{path}: is gone, so nobody knows what the stages there were made with; restore it, "
            "or start the run over with --from-stage 1"
        )
    try:
        kept = read_config(str(path))
    except UserError as error:
        raise UserError(
            f"{error}; restore this file, or start the run over with --from-stage 1"
        ) from error
    there, here = (_flat(settings.model_dump(mode="json")) for settings in (kept, config))
    keys = sorted((there.keys() | here.keys()) - set(_FREE_KEYS))
    differing = [f"{key}={there.get(key)}" for key in keys if there.get(key) != here.get(key)]
    if differing:
        raise UserError(
            f"{folder}: holds a run with {', '.join(differing)}; set name=... for another run, or "
            "start this one over with --from-stage 1"
        )


def refuse_other_lists(folder: Path, digests: Mapping[str, str]) -> None:
    """Compare lists of images with those that the run in a folder was begun with.

    Args:
        folder: of the run; its ``lists.json`` keeps their digests.
        digests: by the list's name, now.

    Raises:
        UserError: a list names other files, or the same in another order.
    """
    path = folder / "lists.json"
    if not path.is_file():
        return
    before = read_json(path)
    if before != digests:
        kept = before if isinstance(before, dict) else {}
        differing = [f"dataset.{name}" for name in digests if kept.get(name) != digests[name]]
        raise UserError(
            f"{folder}: holds a run on other images than {', '.join(differing)} names now; restore "
            "the list, set name=... for another run, or start this one over with --from-stage 1"
        )


def refuse_other_precision(folder: Path, device: Device, say: Callable[[str], None]) -> None:
    """Compare where a run goes on with where it was.

    Args:
        folder: of the run.
        device: it goes on there.
        say: told of another kind of device, or number of processes or threads, which round
            differently.

    Raises:
        UserError: the precision differs.
    """
    path = folder / "environment.json"
    if not path.is_file():
        return
    before = read_json(path)
    if not isinstance(before, dict):
        raise UserError(f"{path}: is no record of an environment; delete it")
    if before.get("precision") != device.precision:
        raise UserError(
            f"{folder}: holds a run in {before.get('precision')}, and this is {device.precision}; "
            f"set precision={before.get('precision')}, or name=... for another run"
        )
    now = _rounding(str(device.torch_device), torch.get_num_threads(), world())
    then = _rounding(str(before.get("device")), before.get("threads"), before.get("processes", 1))
    if then != now:
        say(
            f"{then} before, {now} now; what follows may differ in its last digits from an "
            "uninterrupted run"
        )


def _rounding(device: str, threads: object, processes: object) -> str:
    """Name what the last digits depend on."""
    kind = device.partition(":")[0]
    named = f"{kind}, {threads} threads" if kind == "cpu" else kind
    return named if processes == 1 else f"{processes} processes, {named}"


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return {dotted key: value}."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat
