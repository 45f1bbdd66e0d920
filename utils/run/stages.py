"""The run folder: which stages are done, what they made, and who may work in it."""

import json
import math
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

import yaml
from filelock import FileLock, Timeout
from PIL import Image
from torch import nn

from utils import checkpoint
from utils.config.schema import Config
from utils.device import Device
from utils.distributed import barrier, broadcast, is_first, on_rank_zero
from utils.errors import Stopped, UserError
from utils.files import (
    read_json,
    sha256,
    text_digest,
    write_atomically,
    write_json,
    write_text,
    writing,
)
from utils.progress import clock
from utils.run.comparison import (
    changed_lists,
    find_changes,
    may_go_on,
    portable,
    refuse_other_run,
)
from utils.run.folder import STAGES, stage_again
from utils.run.log import Log, Numbers
from utils.run.results import environment, stage_table
from utils.run.rounds import end_round, finish_round, is_ending, tell_round
from utils.run.signals import defer_signals

Report = dict[str, Any]  # what results.json says of a stage
_UNFINISHED = "unfinished"  # folder in a stage's
_CONTINUED = ("stage.json", f"{_UNFINISHED}/resume.pth", f"{_UNFINISHED}/masks.*.jsonl")
# What stages leave in their folders; other files there are the user's.
_MADE = (
    "votes.json",
    *("checkpoint.pth", "earlier_[12].pth", "masks/**/*.png", "votes/**/*.npy"),
    *("confidence.csv", "doubt.csv", "features.npz", "reliable.txt", "unreliable.txt"),
    *("query_index.json", "unlabeled_scores.csv", "labeled_scores.csv"),
)
# What they draw; it is neither compared nor counted as what later stages are made from.
_DRAWN = (
    "panels/epoch_*.png",
    "panels/teacher/**/*.png",
    "panels/votes/**/*.png",
    "panels/voters/**/*.json",
)
# What the end of a run leaves: results, and predictions of the validation list.
_OF_RUN = (
    *(
        "results.json",
        "examples.png",
        "diagnosis.json",
        "val/labels/**/*.png",
        "val/[146]_*/made_from",
    ),
    *(f"val/[146]_*/{name}" for name in ("images.csv", "confusion.csv", "masks/**/*.png")),
)
_CURVES = ("tensorboard", "wandb")
# Stage 1 reads both: --from-stage of a later stage would refuse others.
_LOWER = "lower optimizer.lr or set precision=fp32, and start over with --from-stage 1"


class Stopwatch:
    """Seconds of a stage over all its interruptions; after a kill, up to the last ``note``."""

    def __init__(self, path: Path) -> None:
        self._path, self._earlier, self._start = path, 0.0, time.monotonic()
        with suppress(OSError, ValueError):  # nothing was noted, or the file is damaged
            self._earlier = float(path.read_text(encoding="utf-8"))

    @property
    def seconds(self) -> float:
        """The seconds until now."""
        return round(self._earlier + time.monotonic() - self._start, 1)

    @on_rank_zero
    def note(self) -> None:
        """Save the seconds."""
        write_atomically(self._path, lambda path: path.write_text(str(self.seconds)), durable=False)


@dataclass(frozen=True)
class Stage:
    """Where a stage works and what it uses of the run."""

    name: str  # of the stage and of its folder; begins with the stage's number
    folder: Path  # takes what the stage makes
    config: Config
    device: Device
    log: Log
    watch: Stopwatch  # runs while the stage does
    before: int = 0  # iterations of earlier training stages

    @property
    def unfinished(self) -> Path:
        """The folder of what resuming needs; removed when the stage ends."""
        return self.folder / _UNFINISHED

    @on_rank_zero
    def save(
        self, net: nn.Module, epoch: int, class_pixels: list[float], name: str = "checkpoint.pth"
    ) -> None:
        """Write a checkpoint: weights, preprocessing, config, stage, number of epochs.

        And the pixels of each class that the network was trained on.

        Raises:
            UserError: a weight or running statistic is not finite, or the disk is full.
        """
        content = {"model": net.state_dict(), "preprocessing": net.preprocessing._asdict()}
        if not checkpoint.is_finite(content["model"]):
            raise UserError(
                f"{self.name}, epoch {epoch}: weights or running statistics are not finite; "
                f"{_LOWER}"
            )
        content["config"] = portable(self.config)
        content |= {"stage": self.name, "epoch": epoch, "class_pixels": class_pixels}
        checkpoint.save(self.folder / name, content)

    def record(
        self,
        epoch: int,
        numbers: Numbers,
        iteration: int = 0,
        ious: Mapping[str, float | None] = MappingProxyType({}),
    ) -> None:
        """Log an epoch's numbers after so many iterations of the stage; IoU by class, if known."""
        self.log.record(self.name, epoch, numbers, self.before + iteration, ious)

    def show(self, tag: str, picture: Image.Image, iteration: int) -> None:
        """Show an RGB picture where the run logs, after so many iterations of the stage."""
        self.log.show(tag, picture, self.before + iteration)

    def refuse_not_finite(
        self, epoch: int, step: int, loss: float, images: Sequence[str]
    ) -> NoReturn:
        """End the run at a batch whose loss or gradient is not finite.

        Args:
            epoch: of the batch, counted from 0.
            step: of the batch, counted from 0.
            loss: of the batch; if it is finite, the gradient is not.
            images: of the batch.

        Raises:
            UserError: always.
        """
        but = ", but its gradient is not finite," if math.isfinite(loss) else ""
        raise UserError(
            f"{self.name}, epoch {epoch + 1}, iteration {step + 1}: the loss is {loss:.4g}{but} on "
            f"{', '.join(images)}; {_LOWER}"
        )


def _numbered(numbers: range) -> list[str]:
    """Return the names of the stages that have one of some numbers."""
    return [name for name in STAGES if int(name[0]) in numbers]


def checkpoint_of(folder: Path) -> Path:
    """Return the path of the network in a training stage's folder."""
    return folder / "checkpoint.pth"


def _finish(folder: Path, report: Report, made_from: str) -> None:
    """Write ``stage.json``: the report; size, time and sha256 of every file that the stage made."""
    made = sorted({path for pattern in _MADE for path in folder.glob(pattern)})
    files = {path.relative_to(folder).as_posix(): _entry(path) for path in made}
    os.sync()  # the files are on the disk before the one that says that the stage has ended
    write_json(folder / "stage.json", {**report, "made_from": made_from, "files": files})


def _entry(path: Path) -> dict[str, Any]:
    digest, status = sha256(path), path.stat()
    return {"size": status.st_size, "mtime_ns": status.st_mtime_ns, "sha256": digest}


def _is_as_noted(path: Path, entry: dict[str, Any], verify: bool) -> bool:
    """Compare a file with its ``_entry``: the content where the time differs, or to verify."""
    if not path.is_file() or path.stat().st_size != entry.get("size", path.stat().st_size):
        return False
    read = verify or path.stat().st_mtime_ns != entry.get("mtime_ns")
    return not read or sha256(path) == entry.get("sha256")


def _read_finished(folder: Path, verify: bool = False) -> tuple[Report, dict[str, str]]:
    """Return a finished stage's report, and the sha256 of its files by path in the folder.

    Args:
        folder: of the stage.
        verify: compare the content of all files, not of those alone whose time has changed.

    Raises:
        UserError: a file is gone or has changed since the stage ended.
    """
    _remove(folder / _UNFINISHED)
    again = f"restore, or do the stage and later ones again with --from-stage {folder.name[0]}"
    content = read_json(folder / "stage.json")
    files = content.pop("files", None) if isinstance(content, dict) else None
    if not isinstance(files, dict) or not all(isinstance(x, dict) for x in files.values()):
        raise UserError(f"{folder / 'stage.json'}: is no report of a stage; {again}")
    spoilt = [name for name, x in files.items() if not _is_as_noted(folder / name, x, verify)]
    if spoilt:
        more = f" and {len(spoilt) - 1} more files" if len(spoilt) > 1 else ""
        raise UserError(
            f"{folder / spoilt[0]}{more}: changed or gone since {folder.name} ended; {again}"
        )
    content.pop("made_from", None)
    return content, {name: entry.get("sha256", "") for name, entry in files.items()}


def _made_in(folder: Path) -> list[Path]:
    """List what a stage left: the files in its ``stage.json``; without it, those of ``_MADE``."""
    with suppress(UserError):
        content = read_json(folder / "stage.json")
        files = content.get("files") if isinstance(content, dict) else None
        if isinstance(files, dict):
            inside = (name for name in files if not {"..", "/"} & {*Path(name).parts})
            return [folder / name for name in inside]
    return [path for pattern in _MADE for path in folder.glob(pattern)]


def _remove(*paths: Path) -> None:
    """Remove files, or folders with all that they hold."""
    for path in paths:
        with writing(path):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _remove_empty(folder: Path) -> None:
    """Remove a folder and those below it, but not where something is in them."""
    for place in (*sorted(folder.rglob("*/"), reverse=True), folder):
        with suppress(OSError):
            place.rmdir()


@contextmanager
def lock_folder(folder: Path, patience: float = 10.0) -> Iterator[None]:
    """Let no other run work in a folder while the block runs.

    Args:
        folder: of the run; is made.
        patience: seconds to try. A killed run's lock is free when its DataLoader workers, which
            may inherit it, have ended: they look for their parent every 5 s.

    Raises:
        UserError: another run holds the lock.
    """
    path, holder = folder / "lock", folder / "lock.holder"
    with writing(path):
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path)
        try:
            lock.acquire(timeout=patience)
        except Timeout:
            named = f" ({holder.read_text('utf-8', 'replace')})" if holder.is_file() else ""
            raise UserError(
                f"{path}: another run works in this folder{named}; wait for it, stop it, or set "
                "name=... for another run"
            ) from None
    with lock:
        write_text(holder, f"pid {os.getpid()} on {platform.node()}")
        yield


class Run:
    """A folder ``<outdir>/<name>`` with a folder a stage. Use it in a ``with`` block.

    The block holds the folder's lock; SIGINT and SIGTERM end it where work can continue later. Of
    several processes all enter it, and rank 0 alone locks, logs and writes common files.

    Args:
        config: the run's settings; kept as ``config.yaml``.
        from_stage: do stages of this number and later again; None continues the run.
        fresh: remove all that the run has made, with its logs.
        lists: digests of the lists of images and of their files; kept as ``lists.json``.
        verify: compare the content of finished stages' files, not their sizes and times alone.

    Attributes:
        device: where and in which precision networks run.
        folder: of the run.
        stages: what each finished stage reported, by its name.
        log: takes lines and numbers.

    Raises:
        UserError: the device does not exist. Entering the block raises it where another run works
            in the folder, or the folder holds a run with other settings or lists.
    """

    def __init__(
        self,
        config: Config,
        from_stage: int | None = None,
        fresh: bool = False,
        lists: Mapping[str, str] = MappingProxyType({}),
        verify: bool = False,
    ) -> None:
        self.config = config
        self.device = Device(config.device, config.precision)
        self.folder = Path(config.outdir) / config.name
        self.stages: dict[str, Report] = {}
        self.log = Log(self.folder)
        self._first, self._fresh, self._lists = 1 if fresh else from_stage, fresh, dict(lists)
        self._files: dict[str, str] = {}
        self._verify = verify

    def __enter__(self) -> "Run":
        """Lock the folder, compare settings, open the logs."""
        with ExitStack() as opened:
            if is_first():
                opened.enter_context(lock_folder(self.folder))
                self._prepare()
                self.log.open(self.config)
                opened.callback(self.log.close)
            opened.push(self._log_stop)
            opened.enter_context(defer_signals())
            barrier()
            self._opened = opened.pop_all()
        self.log.say(f"{self.folder} on {self.device}")
        return self

    def __exit__(self, *error: Any) -> None:
        """Close the logs and release the folder."""
        self._opened.__exit__(*error)

    @property
    def is_new(self) -> bool:
        """Whether there is nothing that the run will continue, or it goes on with other lists."""
        return not self._kept() or is_ending(self.folder) or self._goes_on()

    def stage(self, name: str, work: Callable[..., Report], *inputs: Any) -> Path:
        """Do a stage, unless it is done, and return its folder.

        One that was made, or begun, from other files than earlier stages hold now is done again.

        Args:
            name: of the folder, which begins with the stage's number.
            work: called with the ``Stage`` and the inputs; fills the stage's folder and returns
                its report for ``results.json``.
            *inputs: for ``work``.

        Raises:
            UserError: the stage is done, and a file of it is gone or has changed.
        """
        folder = self.folder / name
        made_from = text_digest(json.dumps(self._files))
        done = broadcast(self._is_done, folder, made_from)
        if done:
            self.log.say(f"{name}: already finished, skipping")
        else:
            self._work(name, work, inputs, made_from)
        verify = self._verify and done
        self.stages[name], files = broadcast(_read_finished, folder, verify)
        self._files |= {f"{name}/{file}": digest for file, digest in files.items()}
        return folder

    def digest(self, path: Path) -> str:
        """Return the sha256 of a finished stage's file.

        Raises:
            UserError: the file was gone when its stage ended.
        """
        name = path.relative_to(self.folder).as_posix()
        if name not in self._files:
            raise UserError(f"{path}: was gone when its stage ended; {stage_again(name)}")
        return self._files[name]

    @on_rank_zero
    def finish(self) -> None:
        """Write results.json: the last stage's mIoU, every stage's report, every file's sha256."""
        self.log.tidy()
        last = next(reversed(self.stages.values()))
        others = ("config.yaml", "lists.json", "environment.json", "metrics.jsonl")
        there = [self.folder / name for name in others if (self.folder / name).is_file()]
        results = {
            "name": self.config.name,
            "checkpoint": self.config.evaluate.checkpoint,
            "miou": last["miou"],
            "per_class_iou": last["per_class_iou"],
            **{key: last[key] for key in ("dice", "per_class_dice", "by_group") if key in last},
            "stages": self.stages,
            "files": {path.name: sha256(path) for path in there} | self._files,
        }
        write_json(self.folder / "results.json", results)
        self.log.result(last["miou"])
        self.log.say(stage_table(self.stages, self.config.evaluate.checkpoint))

    @on_rank_zero
    def add_result(self, name: str, report: Report) -> None:
        """Print a report's mIoU; add the report to results.json, which ``finish`` has written."""
        file = self.folder / "results.json"
        write_json(file, {**read_json(file), name: report})
        self.log.say(f"{name}: {100 * report['miou']:.2f} % mIoU")

    def _is_done(self, folder: Path, made_from: str) -> bool:
        """Tell whether a stage has ended; remove one that was made or begun from other files."""
        done, begun = folder / "stage.json", folder / _UNFINISHED / "made_from"
        then: Any = made_from
        if done.is_file():
            content = read_json(done)
            then = content.get("made_from", then) if isinstance(content, dict) else then
        elif begun.is_file():
            then = begun.read_text(encoding="utf-8", errors="replace")
        if then != made_from:
            self.log.say(f"{folder.name}: was made from other files of earlier stages; done again")
            self._remove_stages(folder.name)
        return done.is_file()

    def _work(
        self, name: str, work: Callable[..., Report], inputs: tuple[Any, ...], made_from: str
    ) -> None:
        folder = self.folder / name
        with writing(folder):
            folder.mkdir(exist_ok=True)
        on_rank_zero(write_json)(self.folder / "environment.json", environment(self.device))
        on_rank_zero(write_text)(folder / _UNFINISHED / "made_from", made_from)
        watch = Stopwatch(folder / _UNFINISHED / "seconds")
        before = sum(report.get("iterations", 0) for report in self.stages.values())
        stage = Stage(name, folder, self.config, self.device, self.log, watch, before)
        try:
            report = work(stage, *inputs)
        except BaseException:
            with suppress(UserError):  # the disk may be full: the first error says more
                watch.note()
            raise
        barrier()  # every process has written its files
        seconds = watch.seconds
        on_rank_zero(_finish)(folder, {**report, "seconds": seconds}, made_from)
        self.log.say(f"{name} done in {clock(seconds)}")

    def _prepare(self) -> None:
        """Compare with what the folder holds, and remove what is to be done again."""
        ended = finish_round(self.folder)  # if a kill left it half ended
        if ended is None and self._kept() and self._goes_on():
            found = find_changes(self.folder, self.config, self._lists, self.device)
            first = min(number for numbers in found.values() for number in numbers)
            earlier = _numbered(range(1, first))
            there = [name for name in earlier if (self.folder / name).is_dir()]
            ended = end_round(self.folder, there)
        if ended is not None:
            self.log.say(tell_round(self.folder, ended))
        kept, lists = self._kept(), self._lists
        is_new = not kept
        if not is_new:
            lists = refuse_other_run(
                self.folder, kept, self.config, lists, self.device, self.log.say
            )
        if is_new or self._first is not None:
            first = 1 if is_new else self._first  # 1: a kill may have left parts
            self._remove_stages(_numbered(range(first, 7))[0])
        if self._first == 1:
            _remove(self.folder / "wandb" / "id")  # another run there
        if self._fresh:
            names = ("config.yaml", "lists.json", "environment.json", "log.txt", "rounds", *_CURVES)
            _remove(*(self.folder / name for name in names))
        settings = yaml.safe_dump(self.config.model_dump(mode="json"))
        config, results = self.folder / "config.yaml", self.folder / "results.json"
        same = config.is_file() and config.read_bytes() == settings.encode()
        if results.is_file() and (not same or changed_lists(self.folder, lists)):
            _remove(results)  # after a kill they would pass for those of these settings
        write_text(config, settings)
        write_json(self.folder / "lists.json", lists)

    def _goes_on(self) -> bool:
        """Tell whether other lists begin the next round of a finished run."""
        if self.config.supervised.start != "last" or self._first is not None:
            return False
        finished = (self.folder / "results.json").is_file()
        return finished and may_go_on(changed_lists(self.folder, self._lists))

    def _kept(self) -> list[str]:
        """Return the stages before ``from_stage`` that are done, or begun so far that it counts."""
        earlier = STAGES if self._first is None else _numbered(range(1, self._first))
        patterns = product(earlier, _CONTINUED)
        found = {name for name, made in patterns if any(self.folder.glob(f"{name}/{made}"))}
        return sorted(found)

    def _remove_stages(self, first: str) -> None:
        """Remove what a stage and later ones made, results and numbers; files of others stay."""
        folders = [self.folder / name for name in STAGES[STAGES.index(first) :]]
        made = {folder: _made_in(folder) for folder in folders}
        _remove(*(path for pattern in _OF_RUN for path in self.folder.glob(pattern)))
        _remove(*(folder / "stage.json" for folder in reversed(folders)))
        for folder in folders:
            drawn = (path for pattern in _DRAWN for path in folder.glob(pattern))
            _remove(folder / _UNFINISHED, *made[folder], *drawn, *folder.rglob(".*.partial"))
            _remove_empty(folder)
            self.log.tidy(folder.name)
        _remove(*(self.folder / "val").rglob(".*.partial"))
        _remove_empty(self.folder / "val")

    def _log_stop(self, _: object, error: BaseException | None, __: object) -> None:
        if isinstance(error, Stopped):
            self.log.say(str(error))
