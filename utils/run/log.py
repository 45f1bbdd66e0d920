"""What a run reports while it works: log.txt, metrics.jsonl, the terminal, loggers."""

import json
import os
import sys
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from types import MappingProxyType

from PIL import Image
from tqdm import tqdm

from utils.config.schema import Config
from utils.distributed import on_rank_zero
from utils.files import append_text, read_records, write_text
from utils.run.folder import STAGES
from utils.run.loggers import Logger, add_tags, open_loggers

Numbers = dict[str, float]


class Log:
    """The logs of a run folder, written by rank 0.

    Args:
        folder: of the run; exists.
    """

    def __init__(self, folder: Path) -> None:
        self._text, self._metrics = folder / "log.txt", folder / "metrics.jsonl"
        self._folder, self._loggers = folder, list[Logger]()

    @on_rank_zero
    def open(self, config: Config) -> None:
        """Open the loggers that the config names; without it there are none."""
        self._loggers = open_loggers(self._folder, config)

    @on_rank_zero
    def close(self) -> None:
        """Close the loggers."""
        for logger in self._loggers:
            logger.close()

    @on_rank_zero
    def say(self, text: str) -> None:
        """Print a line above any progress bar, and keep it in log.txt."""
        try:
            tqdm.write(text)
            sys.stdout.flush()
        except OSError:  # a closed pipe, a full disk: log.txt has every line
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        append_text(self._text, f"{now} {text}\n")

    @on_rank_zero
    def record(
        self,
        stage: str,
        epoch: int,
        numbers: Numbers,
        iteration: int = 0,
        ious: Mapping[str, float | None] = MappingProxyType({}),
    ) -> None:
        """Keep an epoch's numbers in metrics.jsonl, in the loggers and as a line of the log.

        Args:
            stage: its name.
            epoch: how many are done.
            numbers: means of the epoch, by name.
            iteration: of all training stages.
            ious: by class, for the loggers; empty if the epoch was not validated.
        """
        line = json.dumps({"stage": stage, "epoch": epoch, **numbers})
        append_text(self._metrics, line + "\n")
        for logger in self._loggers:
            logger.scalars(add_tags(stage, numbers, ious), iteration)
        shown = "  ".join(f"{key} {value:.4g}" for key, value in numbers.items())
        self.say(f"{stage}  epoch {epoch}  {shown}")

    @on_rank_zero
    def show(self, tag: str, picture: Image.Image, iteration: int) -> None:
        """Show a picture in the loggers."""
        for logger in self._loggers:
            logger.picture(tag, picture, iteration)

    @on_rank_zero
    def result(self, miou: float) -> None:
        """Give the loggers the run's mIoU, in [0, 1]."""
        for logger in self._loggers:
            logger.result(miou)

    @on_rank_zero
    def tidy(self, stage: str = "", epochs: int = 0) -> None:
        """Remove a stage's epochs after the first ``epochs``, and broken lines; sort by stage."""
        kept = [
            record
            for record in read_records(self._metrics)
            if isinstance(record.get("stage"), str) and isinstance(record.get("epoch"), int)
            if record["stage"] != stage or record["epoch"] <= epochs
        ]
        places = {name: place for place, name in enumerate(STAGES)}
        kept.sort(key=lambda record: (places.get(record["stage"], -1), record["epoch"]))
        if kept or self._metrics.exists():
            write_text(self._metrics, "".join(f"{json.dumps(record)}\n" for record in kept))
