"""Whether a command continues the run that a folder holds, or would be another run."""

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from utils.config.reading import flatten, read_config
from utils.config.schema import Config
from utils.config.stages import READERS, readers, saves_memory
from utils.device import Device
from utils.errors import UserError
from utils.files import read_json
from utils.run.results import environment

_FREE_KEYS = {key for key, stages in READERS.items() if not stages and "." not in key}
_COMPARED_AS_LISTS = {f"dataset.{key}" for key in ("root", "labeled", "unlabeled", "val")}
_RESOLVED = {"precision", "device"}  # what they resolve to counts
_AGAIN = "restore this file, or start the run over with --from-stage 1"
_ROUNDING = ("precision", "device", "threads", "processes")  # what the last digits depend on


def refuse_other_run(
    folder: Path,
    kept: Sequence[str],
    config: Config,
    digests: Mapping[str, str],
    device: Device,
    say: Callable[[str], None],
) -> dict[str, str]:
    """Compare settings, lists of images and precision with those of the run in a folder.

    Args:
        folder: of the run.
        kept: names of the stages that are finished or begun, and that the run continues.
        config: the settings now.
        digests: of the lists of images now, by name; and of their files, by ``<name> files``.
        device: where the run continues.
        say: told if a setting that saves memory or files have changed; or device, processes or
            threads, by which the last digits differ.

    Returns:
        What ``lists.json`` is to hold: the digests at the time when the stages read the lists.

    Raises:
        UserError: what a kept stage has read differs, or a file of the run folder is damaged.
    """
    was, then = differing_keys(_kept_config(folder), config), _kept(folder / "environment.json")
    lists, now = _kept(folder / "lists.json"), environment(device)
    others = [name for name in digests if lists.get(name) != digests[name]]
    other_lists = changed_lists(folder, digests)
    changed = [key for key in _ROUNDING if then.get(key) != now[key]]
    differing = find_changes(folder, config, digests, device)
    read = {what: _of(kept, numbers) for what, numbers in differing.items()}
    refused = [what for what, stages in read.items() if stages]
    if refused:
        first = min(read[what][0] for what in refused)
        finished = (folder / "results.json").is_file()
        more = ", set supervised.start=last without --from-stage to go on from its result"
        more = more if finished and may_go_on(other_lists) else ""
        raise UserError(
            f"{folder}: its stages used {', '.join(refused)}; restore that, set name=... for "
            f"another run{more}, or redo {first} and later stages with --from-stage {first[0]}"
        )
    for key in filter(saves_memory, was):
        if stages := _of(kept, readers(key)):
            say(f"{key}: was {was[key]} in {', '.join(stages)}, whose results stay")
    taken = {x: digests[x] for x in others if x.partition(" ")[0] in other_lists}
    old = [name for name in others if name not in taken]
    if old:
        what = ", ".join(f"dataset.{name}" for name in old)
        say(f"{what}: other sizes or times than when the run began; results may mix the two")
    if changed:
        what = ", ".join(f"{key} {then.get(key)} → {now[key]}" for key in changed)
        say(f"{what}: results may differ{_more(changed)}")
    return {**lists, **taken}


def _more(changed: Sequence[str]) -> str:
    """Say by how much results differ where these have changed."""
    if "processes" in changed:
        return ", since dropout, mixing and, on CPUs, batch norm depend on how many there are"
    return " in their last digits"


def find_changes(
    folder: Path, config: Config, digests: Mapping[str, str], device: Device
) -> dict[str, tuple[int, ...]]:
    """Return what differs from the run in a folder, in words, and the stages that read it.

    Args, Raises: as ``refuse_other_run``.
    """
    was, then = differing_keys(_kept_config(folder), config), _kept(folder / "environment.json")
    found = {f"{x}={value}": readers(x) for x, value in was.items() if not saves_memory(x)}
    lists = changed_lists(folder, digests)
    found |= {f"another list dataset.{x}": readers(f"dataset.{x}") for x in lists}
    if then.get("precision") != device.precision:
        found[f"precision={then.get('precision')}"] = readers("precision")
    return found


def changed_lists(folder: Path, digests: Mapping[str, str]) -> list[str]:
    """Return the names of the lists that differ from those of the run in a folder.

    Raises:
        UserError: ``lists.json`` is damaged.
    """
    lists = _kept(folder / "lists.json")
    return [name for name in digests if " " not in name and lists.get(name) != digests[name]]


def may_go_on(changed: Sequence[str]) -> bool:
    """Tell whether a finished run may go on with other lists: what validates it is the same."""
    return bool(changed) and {*changed} <= {"labeled", "unlabeled"}


def _of(stages: Sequence[str], numbers: Sequence[int]) -> list[str]:
    return [name for name in stages if int(name[0]) in numbers]


def differing_keys(one: Config, other: Config) -> dict[str, Any]:
    """Return the settings of ``one`` that can change a result and differ from ``other``'s."""
    there, here = (flatten(config.model_dump(mode="json")) for config in (one, other))
    keys = sorted((there.keys() | here.keys()) - _RESOLVED - _COMPARED_AS_LISTS)
    changed = [key for key in keys if there.get(key) != here.get(key) and readers(key)]
    return {key: there.get(key) for key in changed}


def portable(config: Config) -> dict[str, Any]:
    """Return the settings that a checkpoint holds: those that can change a result, but a device."""
    settings = config.model_dump(mode="json", exclude=_FREE_KEYS | {"device"})
    del settings["dataset"]["root"]
    return settings


def _kept_config(folder: Path) -> Config:
    path = _existing(folder / "config.yaml")
    text = path.read_text(encoding="utf-8", errors="replace")
    if "\nneighbours:" in text.replace(" ", "") and not re.search("^method:", text, re.MULTILINE):
        raise UserError(
            f"{folder}: holds a run from before 'method:' was a key; its method 'cisc' is called "
            "'cisc_patch' now, and 'cisc_published' is called 'cisc'; set name=... for another "
            "run, or start this one over with --from-stage 1"
        )
    try:
        return read_config(str(path))
    except UserError as error:
        raise UserError(f"{error}; {_AGAIN}") from error


def _kept(path: Path) -> dict[str, Any]:
    """Read a JSON object of the run folder."""
    _existing(path)
    with suppress(UserError):
        content = read_json(path)
        if isinstance(content, dict):
            return content
    raise UserError(f"{path}: holds no JSON object; {_AGAIN}")


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise UserError(f"{path}: no such file, which tells what run this folder holds; {_AGAIN}")
    return path
