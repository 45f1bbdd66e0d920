"""The run folder: which stages are done, what they gave, and who may work in it."""

import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

import yaml

from utils.config import Config
from utils.distributed import barrier, by_first, is_first, shared
from utils.errors import Stopped
from utils.files import sha256, write_json, write_text, writing
from utils.lock import locked
from utils.log import Log
from utils.precision import Device
from utils.results import environment, stage_table
from utils.same_run import refuse_other_config, refuse_other_lists, refuse_other_precision
from utils.signals import stopping_later
from utils.stage import Report, Stage, Stopwatch, finish, is_finished, read_finished

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
        if shared(is_finished, folder):
            self.log.say(f"{name}: done before")
        else:
            self._work(name, work, inputs)
        self.stages[name], files = shared(read_finished, folder)
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
