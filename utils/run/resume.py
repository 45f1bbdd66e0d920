"""What an unfinished stage keeps, so that the same command continues to the same result."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import Any

from torch import nn

from utils import checkpoint
from utils.distributed import on_rank_zero, rank
from utils.errors import Stopped, UserError
from utils.files import append_text, read_records
from utils.optimization import Optimization
from utils.progress import StageBar
from utils.run.signals import stop_here
from utils.run.stages import Report, Stage


class Progress:
    """How far a training stage has come.

    A ``with`` block begins at the state that ``resume.pth`` holds, and saves its state when a
    signal ends it. Rank 0 saves; every process loads.

    Args:
        stage: the stage.
        net, optimization, bar, running: their states are saved and loaded; ``running`` can be None.

    Attributes:
        epoch: finished epochs.
        step: finished iterations of the current epoch.
        seen: state of the bar in the current epoch, ``{}`` at its begin.
        report: what ``results.json`` will say of the stage, so far.
    """

    def __init__(
        self,
        stage: Stage,
        net: nn.Module,
        optimization: Optimization,
        bar: StageBar,
        running: nn.Module | None = None,
    ) -> None:
        self._stage, self._net, self._optimization, self._bar = stage, net, optimization, bar
        self._running = nn.Identity() if running is None else running
        self._path = stage.unfinished / "resume.pth"
        self.epoch, self.step = 0, 0
        self.seen: dict[str, Any] = {}
        self.report: Report = {}

    def __enter__(self) -> "Progress":
        """Load what was saved.

        Raises:
            UserError: ``resume.pth`` is damaged.
        """
        if self._path.is_file():
            try:
                self._load(checkpoint.load(self._path))
            except (UserError, KeyError, TypeError, ValueError, RuntimeError) as error:
                raise UserError(
                    f"{self._path}: not a state of this stage; do the stage again with "
                    f"--from-stage {self._stage.name[0]}"
                ) from error
        # After a kill between an epoch's line of metrics.jsonl and its state, the epoch is redone.
        self._stage.log.tidy(self._stage.name, self.epoch)
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        """Save if a signal ends the block."""
        if isinstance(error, Stopped):
            self._save()

    def step_done(self) -> None:
        """Count an iteration; stop if a signal came, or save as ``checkpoint_every`` says."""
        self.step += 1
        stop_here()
        every = self._stage.config.checkpoint_every
        if every is not None and self.step % every == 0:
            self._save()

    def epoch_done(self, report: Report) -> None:
        """Count an epoch and save; stop if a signal came."""
        self.epoch, self.step, self.seen, self.report = self.epoch + 1, 0, {}, report
        self._save()
        stop_here()

    @on_rank_zero
    def _save(self) -> None:
        state = {
            "net": self._net.state_dict(),
            "optimization": self._optimization.state_dict(),
            "running": self._running.state_dict(),
            "epoch": self.epoch,
            "step": self.step,
            "seen": self._bar.state_dict() if self.step else {},
            "report": self.report,
        }
        checkpoint.save(self._path, state)
        self._stage.watch.note()

    def _load(self, state: dict[str, Any]) -> None:
        self._net.load_state_dict(state["net"])
        self._optimization.load_state_dict(state["optimization"])
        self._running.load_state_dict(state["running"])
        self.epoch, self.step = int(state["epoch"]), int(state["step"])
        self.seen, self.report = dict(state["seen"]), dict(state["report"])


class Journal:
    """The files that an unfinished labeling has written, and what it found of their images.

    A line is added once its files are there, and has their sizes: after a power cut a mask that the
    disk has no more than a part of is written again.

    Args:
        stage: its ``unfinished`` folder keeps a file a process, ``masks.0.jsonl`` and so on.
    """

    def __init__(self, stage: Stage) -> None:
        self._stage, self._path = stage, stage.unfinished / f"masks.{rank()}.jsonl"
        self._one_at_a_time = Lock()

    def read(self) -> dict[str, Any]:
        """Return what was found of every image whose files are there, by any process."""
        files = sorted(self._stage.unfinished.glob("masks.*.jsonl"))
        records = [record for file in files for record in read_records(file)]
        return {r["image"]: r["found"] for r in records if self._is_there(r)}

    def add(
        self,
        images: Sequence[str],
        files: Sequence[Sequence[Path]],
        found: Sequence[Mapping[str, Any]],
    ) -> dict[str, Any]:
        """Keep what was found, as JSON has it, of a batch; the files of each image are written.

        Returns it by image. Threads may call it.
        """
        folder = self._stage.folder
        sizes = [{x.relative_to(folder).as_posix(): x.stat().st_size for x in own} for own in files]
        rows = zip(images, found, sizes, strict=True)
        lines = [json.dumps(dict(zip(_KEYS, row, strict=True))) for row in rows]
        with self._one_at_a_time:
            # A kill may have cut the last line short: the next one begins anew.
            append_text(self._path, "".join(f"\n{line}" for line in lines))
            self._stage.watch.note()
        return dict(zip(images, found, strict=True))

    def _is_there(self, record: dict[str, Any]) -> bool:
        whole = all(isinstance(record.get(key), kind) for key, kind in _KEYS.items())
        files = record["files"] if whole else {}
        paths = [self._stage.folder / name for name in files]
        # A power cut may have left a part of a file.
        sizes = [path.stat().st_size for path in paths if path.is_file()]
        return bool(files) and sizes == [*files.values()]


# Of a line of the journal.
_KEYS = {"image": str, "found": dict, "files": dict}  # sizes by path
