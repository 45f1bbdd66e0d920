"""One stage of a run, as the function that does it sees it, and what it leaves."""

import contextlib
import math
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from utils import checkpoint
from utils.config import Config
from utils.distributed import by_first
from utils.errors import UserError
from utils.files import read_json, sha256, write_json, write_text, writing
from utils.log import Log, Numbers
from utils.precision import Device

Report = dict[str, Any]  # what results.json says of a stage
_SHOWN = 3  # files that an error names


class Stopwatch:
    """Seconds over all sittings; a sitting that is killed counts up to its last note.

    Args:
        path: where the seconds are noted.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._earlier, self._start = path, 0.0, time.monotonic()
        with contextlib.suppress(OSError, ValueError):  # the first sitting, or a spoilt note
            self._earlier = float(path.read_text(encoding="utf-8"))

    @property
    def seconds(self) -> float:
        """The seconds until now."""
        return round(self._earlier + time.monotonic() - self._start, 1)

    @by_first
    def note(self) -> None:
        """Keep the seconds for the next sitting."""
        write_text(self._path, str(self.seconds))


@dataclass(frozen=True)
class Stage:
    """Where a stage works and what it may ask for.

    Attributes:
        name: of the stage and of its folder; begins with the stage's number.
        folder: what the stage makes goes here.
        config: the run's settings.
        device: where and in which precision networks run.
        log: of the run.
        watch: runs while the stage does.
    """

    name: str
    folder: Path
    config: Config
    device: Device
    log: Log
    watch: Stopwatch

    @by_first
    def save(self, net: nn.Module, epoch: int) -> None:
        """Write ``checkpoint.pth``: weights, config, stage, and how many epochs they saw."""
        content = {"model": net.state_dict(), "config": self.config.model_dump(mode="json")}
        checkpoint.save(checkpoint_of(self.folder), {**content, "stage": self.name, "epoch": epoch})

    def record(self, epoch: int, numbers: Numbers) -> None:
        """Keep an epoch's numbers."""
        self.log.record(self.name, epoch, numbers)

    def leave_out(self, epoch: int, step: int, loss: float, images: Sequence[str]) -> None:
        """Say which batch was left out, its loss or gradient not being finite.

        Args:
            epoch: of the batch, counted from 0.
            step: of the batch, counted from 0.
            loss: of the batch; if it is finite, the gradient is not.
            images: of the batch.

        Raises:
            UserError: ``on_nonfinite`` is ``stop``.
        """
        place = f"{self.name}, epoch {epoch + 1}, iteration {step + 1}"
        but = ", but its gradient is not finite," if math.isfinite(loss) else ""
        said = f"{place}: the loss is {loss:.4g}{but} on {', '.join(images)}"
        if self.config.on_nonfinite == "skip":
            self.log.say(f"{said}; this batch changes no weight")
            return
        raise UserError(
            f"{said}; set on_nonfinite=skip to go on without this batch, or start over with "
            f"--from-stage {self.name[0]}, a lower optimizer.lr or precision=fp32"
        )

    @property
    def unfinished(self) -> Path:
        """Where the stage keeps what going on needs; gone when it ends."""
        return unfinished_of(self.folder)


def checkpoint_of(folder: Path) -> Path:
    """Tell where a training stage's folder keeps its network."""
    return folder / "checkpoint.pth"


def unfinished_of(folder: Path) -> Path:
    """Tell where a stage's folder keeps what going on needs."""
    return folder / "unfinished"


def is_finished(folder: Path) -> bool:
    """Whether a folder holds a stage that ended."""
    return (folder / "stage.json").is_file()


def finish(folder: Path, report: Report) -> None:
    """Write ``stage.json``: the report, and the sha256 of all that the stage made."""
    files = {path.relative_to(folder).as_posix(): sha256(path) for path in _made(folder)}
    write_json(folder / "stage.json", {**report, "files": files})
    _remove_unfinished(folder)


def read_finished(folder: Path) -> tuple[Report, dict[str, str]]:
    """Return a finished stage's report, and the sha256 of its files by path in the folder.

    Raises:
        UserError: a file is gone or has changed since the stage ended.
    """
    _remove_unfinished(folder)
    again = f"or do the stage and later ones again with --from-stage {folder.name[0]}"
    content = read_json(folder / "stage.json")
    files = content.pop("files", None) if isinstance(content, dict) else None
    if not isinstance(files, dict):
        raise UserError(f"{folder / 'stage.json'}: is no report of a stage; restore it, {again}")
    spoilt = [name for name, digest in files.items() if _digest(folder / name) != digest]
    if spoilt:
        more = f" and {len(spoilt) - _SHOWN} more" if len(spoilt) > _SHOWN else ""
        what = "has changed or is gone" if len(spoilt) == 1 else "have changed or are gone"
        raise UserError(
            f"{folder / spoilt[0]}{''.join(f', {name}' for name in spoilt[1:_SHOWN])}{more}: "
            f"{what} since {folder.name} ended; restore, {again}"
        )
    return content, files


def _digest(path: Path) -> str | None:
    return sha256(path) if path.is_file() else None


def _made(folder: Path) -> Iterator[Path]:
    """Yield a stage's files in order, without what only going on needs."""
    for path in sorted(folder.rglob("*")):
        scratch = unfinished_of(folder) in path.parents or path.suffix == ".partial"
        if path.is_file() and not scratch and path != folder / "stage.json":
            yield path


def _remove_unfinished(folder: Path) -> None:
    if unfinished_of(folder).is_dir():
        with writing(unfinished_of(folder)):
            shutil.rmtree(unfinished_of(folder))
