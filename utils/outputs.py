"""Whether a command may write where its user tells it to; asked before any work begins."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from utils.errors import UserError
from utils.run.folder import run_of


class Output(NamedTuple):
    """A place that a command line names for what the command makes."""

    option: str
    path: Path
    suffixes: Sequence[str] = ()  # of a file, and of files that it may replace; (): a folder


def refuse_outputs(outputs: Sequence[Output], inputs: Mapping[str, Path]) -> None:
    """Refuse to write over what is read, what a run has made, or a file of another kind.

    Args:
        outputs: the places.
        inputs: files and folders that the command reads, by the name that a user knows.

    Raises:
        UserError: a place lies where something is read, or is a folder that holds it; it is a
            file of a run, a file of another suffix, or a folder where a file is wanted; or it
            cannot be written to.
    """
    for output in outputs:
        _refuse_read(output, inputs)
        _refuse_taken(output)
        _refuse_closed(output)


def _refuse_read(output: Output, inputs: Mapping[str, Path]) -> None:
    here = _real(output.path)
    for name, place in inputs.items():
        there = _real(place)
        if here.is_relative_to(there) or (not output.suffixes and there.is_relative_to(here)):
            raise UserError(
                f"{output.option}: {output.path} would lie where {name} is read, {place}; name "
                "another place"
            )


def _refuse_taken(output: Output) -> None:
    option, path, suffixes = output
    if path.parts[:1] == ("~",):
        raise UserError(
            f"{option}: {path} would be in a folder called ~, since shells read ~ at the begin of "
            "a word alone; write a space in place of =, or the whole path"
        )
    run = run_of(_real(path))
    if run is not None:
        raise UserError(f"{option}: {path} is of the run in {run}; name another place")
    if path.is_dir() and suffixes:
        raise UserError(f"{option}: {path} is a folder; name a file {' or '.join(suffixes)}")
    if path.is_file() and not suffixes:
        raise UserError(f"{option}: {path} is a file; name a folder")
    if path.is_file() and path.suffix.lower() not in suffixes:
        raise UserError(
            f"{option}: {path} is there and is no {' or '.join(suffixes)} file; name another, or "
            "remove it"
        )


def _refuse_closed(output: Output) -> None:
    """Refuse a place that the system lets nobody make, or this user not write to."""
    there = next(place for place in (output.path, *output.path.absolute().parents) if _is(place))
    if there != output.path and not there.is_dir():
        raise UserError(f"{output.option}: {there} is not a folder; name another place")
    if not os.access(there, os.W_OK):
        raise UserError(f"{output.option}: {there} cannot be written to; name another place")


def _is(place: Path) -> bool:
    return os.path.lexists(place)


def _real(path: Path) -> Path:
    """Follow links, also those in a circle."""
    return Path(os.path.realpath(path))
