"""What an unfinished stage keeps, so that the same command goes on to the same result."""

import json
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import nn

from utils import checkpoint
from utils.distributed import by_first, rank
from utils.errors import Stopped, UserError
from utils.files import append_text, read_records, sha256, write_atomically, write_text
from utils.optimization import Optimization
from utils.outcomes import Outcomes
from utils.progress import StageBar
from utils.run.signals import stop_here
from utils.run.stages import Report, Stage


class Progress:
    """How far a training stage has come.

    A ``with`` block begins where the last sitting left off, as ``resume.pth`` has it, and saves
    where it stands when a signal ends it. The state before the last is kept too. The first
    process saves, and all take up what it has saved.

    Args:
        stage: the stage.
        net, optimization, bar: take up their states; are saved with the rest.
        outcomes: of the steps; a state that follows a loss that was not finite is not saved.

    Attributes:
        epoch: whole epochs that are done.
        step: iterations of the epoch under way that are done.
        seen: what the bar saw of that epoch in earlier sittings.
        report: what ``results.json`` shall say, so far.
    """

    def __init__(
        self,
        stage: Stage,
        net: nn.Module,
        optimization: Optimization,
        bar: StageBar,
        outcomes: Outcomes,
    ) -> None:
        self._outcomes = outcomes
        self._stage, self._net, self._optimization, self._bar = stage, net, optimization, bar
        self._path = stage.unfinished / "resume.pth"
        self._previous = stage.unfinished / "resume.previous.pth"
        self.epoch, self.step = 0, 0
        self.seen: dict[str, Any] = {}
        self.report: Report = {}

    def __enter__(self) -> "Progress":
        """Take up what was saved."""
        self._load()
        # A kill between an epoch's line of metrics.jsonl and its state does the epoch again.
        self._stage.log.rewind(self._stage.name, self.epoch)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Save what a signal interrupts."""
        if isinstance(error, Stopped):
            self._outcomes.settle()
            self._save()

    def step_done(self) -> None:
        """Count an iteration; save where ``checkpoint_every`` says so. A place to stop."""
        self.step += 1
        every = self._stage.config.checkpoint_every
        stop_here()
        if every is not None and self.step % every == 0:
            self._outcomes.settle()
            self._save()

    def epoch_done(self, report: Report) -> None:
        """Count an epoch and save. A place to stop.

        Raises:
            UserError: gradients overflow fp16.
        """
        self._outcomes.settle()
        if self._optimization.overflows:
            raise UserError(
                f"{self._stage.name}, epoch {self.epoch + 1}: gradients overflow fp16 however they "
                "are scaled; set precision=bf16 or fp32, or lower optimizer.lr, with --from-stage "
                f"{self._stage.name[0]}"
            )
        self.epoch, self.step, self.seen, self.report = self.epoch + 1, 0, {}, report
        self._save()
        stop_here()

    @by_first
    def _save(self) -> None:
        state = {
            "net": self._net.state_dict(),
            "optimization": self._optimization.state_dict(),
            "epoch": self.epoch,
            "step": self.step,
            "seen": self._bar.state_dict() if self.step else {},
            "report": self.report,
        }

        def write(partial: Path) -> None:
            checkpoint.write(partial, state)
            if self._path.is_file():
                self._path.replace(self._previous)

        write_atomically(self._path, write)
        self._stage.watch.note()

    def _load(self) -> None:
        """Take up the last state that is whole."""
        there = [path for path in (self._path, self._previous) if path.is_file()]
        for path in there:
            try:
                self._take_up(checkpoint.load(path))
            except (UserError, KeyError, TypeError, ValueError, RuntimeError):
                self._stage.log.say(f"{path}: is not whole; trying the state before it")
            else:
                if path != there[0]:  # the next save must not put it in the whole one's place
                    by_first(there[0].unlink)(missing_ok=True)
                return
        if there:
            raise UserError(
                f"{there[0]}: neither this state nor one before it is whole; do the stage again "
                f"with --from-stage {self._stage.name[0]}"
            )

    def _take_up(self, state: dict[str, Any]) -> None:
        self._net.load_state_dict(state["net"])
        self._optimization.load_state_dict(state["optimization"])
        self.epoch, self.step = int(state["epoch"]), int(state["step"])
        self.seen, self.report = dict(state["seen"]), dict(state["report"])


class Journal:
    """The masks that an unfinished labeling has written, with their confidence and sha256.

    Args:
        stage: its ``unfinished`` folder keeps a file a process, ``masks.0.jsonl`` and so on.
    """

    def __init__(self, stage: Stage) -> None:
        self._stage, self._path = stage, stage.unfinished / f"masks.{rank()}.jsonl"

    def read(self) -> dict[str, float]:
        """Return the confidence of every image whose mask is whole; forget the others.

        One process reads what all have written, before any of them goes on.
        """
        files = sorted(self._stage.unfinished.glob("masks.*.jsonl"))
        records = [record for file in files for record in read_records(file)]
        whole = {record["image"]: record for record in records if self._is_whole(record)}
        write_text(self._path, "".join(json.dumps(record) + "\n" for record in whole.values()))
        for file in set(files) - {self._path}:
            file.unlink()
        return {name: record["confidence"] for name, record in whole.items()}

    def add(
        self, images: Sequence[str], masks: Sequence[Path], confidences: Sequence[float]
    ) -> dict[str, float]:
        """Keep what a batch gave, its masks being written; return confidence by image."""
        lines = [
            {
                "image": image,
                "confidence": confidence,
                "mask": mask.relative_to(self._stage.folder).as_posix(),
                "sha256": sha256(mask),
            }
            for image, mask, confidence in zip(images, masks, confidences, strict=True)
        ]
        append_text(self._path, "".join(json.dumps(line) + "\n" for line in lines))
        self._stage.watch.note()
        return dict(zip(images, confidences, strict=True))

    def _is_whole(self, record: dict[str, Any]) -> bool:
        if not {"image", "confidence", "mask", "sha256"} <= record.keys():
            return False
        mask = self._stage.folder / str(record["mask"])
        return mask.is_file() and sha256(mask) == record["sha256"]
