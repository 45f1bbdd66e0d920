"""The run folder: which stages are done, what they gave, and who may work in it."""

import contextlib
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

import yaml
from torch import nn

from utils import checkpoint
from utils.config.schema import Config
from utils.device import Device
from utils.distributed import barrier, broadcast, by_first, is_first
from utils.errors import Stopped, UserError
from utils.files import read_json, sha256, write_json, write_text, writing
from utils.run.comparison import refuse_other_config, refuse_other_lists, refuse_other_precision
from utils.run.lock import locked
from utils.run.log import Log, Numbers
from utils.run.results import environment, stage_table
from utils.run.signals import stopping_later

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


_RESULTS = ("results.json", "examples.png")  # what a run writes after its last stage


class Run:
    """A folder ``<outdir>/<name>`` with a folder a stage. Use it in a ``with`` block.

    The block holds the folder's lock; SIGINT and SIGTERM end it where work can go on later. Of
    several processes all enter it, and the first alone locks, logs and writes what all share.

    Args:
        config: the run's settings; kept as ``config.yaml``.
        from_stage: do stages of this number and later again; None goes on where the run stopped.
        fresh: remove all that the run has made, its logs too.
        lists: digests of the lists of images, by name; kept as ``lists.json``.

    Attributes:
        device: where and in which precision networks run.
        folder: of the run.
        stages: what each finished stage reported, by its name.
        log: takes lines and numbers.

    Raises:
        UserError: the device does not exist. The block's begin raises it where another run works
            in the folder, or it holds a run with other settings or lists.
    """

    def __init__(
        self,
        config: Config,
        from_stage: int | None = None,
        fresh: bool = False,
        lists: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.config = config
        self.device = Device(config.device, config.precision)
        self.folder = Path(config.outdir) / config.name
        self.stages: dict[str, Report] = {}
        self.log = Log(self.folder)
        self._from_stage, self._fresh, self._lists = from_stage, fresh, dict(lists)
        self._files: dict[str, str] = {}

    def __enter__(self) -> "Run":
        """Lock the folder, compare settings, open the logs."""
        with ExitStack() as opened:
            if is_first():
                opened.enter_context(locked(self.folder / "lock", self.log.say))
                self._prepare()
                opened.enter_context(self.log)
            opened.enter_context(stopping_later())
            barrier()
            self._opened = opened.pop_all()
        self.log.say(f"{self.folder} on {self.device}")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the logs and let go of the folder."""
        with self._opened:
            if isinstance(error, Stopped):
                self.log.say(str(error))

    def stage(self, name: str, work: Callable[..., Report], *inputs: Any) -> Path:
        """Do a stage, unless it is done, and return its folder.

        Args:
            name: of the folder, which begins with the stage's number.
            work: called with the ``Stage`` and the inputs; fills the stage's folder and returns
                what results.json shall say of it.
            *inputs: for ``work``.

        Raises:
            UserError: the stage is done, and a file of it is gone or has changed.
        """
        folder = self.folder / name
        if broadcast(is_finished, folder):
            self.log.say(f"{name}: done before")
        else:
            self._work(name, work, inputs)
        self.stages[name], files = broadcast(read_finished, folder)
        self._files |= {f"{name}/{file}": digest for file, digest in files.items()}
        return folder

    @by_first
    def finish(self) -> None:
        """Write results.json: the last stage's mIoU, every stage's report, every file's sha256."""
        last = next(reversed(self.stages.values()))
        others = ("config.yaml", "lists.json", "environment.json", "metrics.jsonl", "examples.png")
        there = [self.folder / name for name in others if (self.folder / name).is_file()]
        results = {
            "name": self.config.name,
            "checkpoint": self.config.evaluate.checkpoint,
            "miou": last["miou"],
            "per_class_iou": last["per_class_iou"],
            "stages": self.stages,
            "files": {path.name: sha256(path) for path in there} | self._files,
        }
        write_json(self.folder / "results.json", results)
        self.log.say(stage_table(self.stages, self.config.evaluate.checkpoint))

    def _work(self, name: str, work: Callable[..., Report], inputs: tuple[Any, ...]) -> None:
        folder = self.folder / name
        with writing(folder):
            folder.mkdir(exist_ok=True)
        by_first(write_json)(self.folder / "environment.json", environment(self.device))
        watch = Stopwatch(folder / "unfinished" / "seconds")
        stage = Stage(name, folder, self.config, self.device, self.log, watch)
        try:
            report = work(stage, *inputs)
        except BaseException:
            if stage.unfinished.is_dir():
                watch.note()
            raise
        barrier()  # all have written what they make
        by_first(finish)(folder, {**report, "seconds": watch.seconds})

    def _prepare(self) -> None:
        """Compare with what the folder holds, and remove what shall be done again."""
        if self._fresh or self._from_stage == 1:
            self._remove_stages(1)
        else:
            if any(self.folder.glob("[1-6]_*/*")):
                refuse_other_config(self.folder, self.config)
                refuse_other_lists(self.folder, self._lists)
                refuse_other_precision(self.folder, self.device, self.log.say)
            if self._from_stage is not None:
                self._remove_stages(self._from_stage)
        if self._fresh:
            self._remove(
                "config.yaml", "lists.json", "environment.json", "metrics.jsonl", "log.txt"
            )
            shutil.rmtree(self.folder / "tensorboard", ignore_errors=True)
        settings = yaml.safe_dump(self.config.model_dump(mode="json"))
        write_text(self.folder / "config.yaml", settings)
        write_json(self.folder / "lists.json", self._lists)

    def _remove_stages(self, first: int) -> None:
        """Forget stages and what was said of them; a kill halfway leaves none that looks done."""
        folders = [f for f in sorted(self.folder.glob("[1-6]_*")) if int(f.name[0]) >= first]
        self._remove(*_RESULTS, *(f"{folder.name}/stage.json" for folder in folders))
        for folder in folders:
            with writing(folder):
                shutil.rmtree(folder)
        self.log.rewind(str(first), 0)

    def _remove(self, *names: str) -> None:
        for name in names:
            with writing(self.folder / name):
                (self.folder / name).unlink(missing_ok=True)
