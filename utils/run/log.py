"""What a run reports while it works: log.txt, metrics.jsonl, TensorBoard, the terminal."""

import json
import os
import sys
from datetime import datetime, timezone
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from utils.distributed import by_first
from utils.files import append_text, read_records, write_text, writing

Numbers = dict[str, float]


class Log:
    """The logs of a run folder, written by rank 0.

    Args:
        folder: of the run; exists.
    """

    def __init__(self, folder: Path) -> None:
        self._text, self._metrics = folder / "log.txt", folder / "metrics.jsonl"
        self._curves = folder / "tensorboard"

    @by_first
    def open(self) -> None:
        """Open TensorBoard's file; to be called before ``record``."""
        with writing(self._curves):
            self._board = SummaryWriter(str(self._curves))

    @by_first
    def close(self) -> None:
        """Close TensorBoard's file."""
        with writing(self._curves):
            self._board.close()

    @by_first
    def say(self, text: str) -> None:
        """Print a line above any progress bar, and keep it in log.txt."""
        try:
            tqdm.write(text)
            sys.stdout.flush()
        except OSError:  # a closed pipe, a full disk: log.txt has every line
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        append_text(self._text, f"{now} {text}\n")

    @by_first
    def record(self, stage: str, epoch: int, numbers: Numbers) -> None:
        """Keep an epoch's numbers in metrics.jsonl, in TensorBoard and as a line of the log."""
        line = json.dumps({"stage": stage, "epoch": epoch, **numbers})
        append_text(self._metrics, line + "\n")
        with writing(self._curves):
            for key, value in numbers.items():
                self._board.add_scalar(f"{stage}/{key}", value, epoch)
        shown = "  ".join(f"{key} {value:.4g}" for key, value in numbers.items())
        self.say(f"{stage}  epoch {epoch}  {shown}")

    @by_first
    def tidy(self, stage: str = "", epochs: int = 0) -> None:
        """Remove a stage's epochs after the first ``epochs``, and broken lines; sort by stage."""
        kept = [
            record
            for record in read_records(self._metrics)
            if isinstance(record.get("stage"), str) and isinstance(record.get("epoch"), int)
            if record["stage"] != stage or record["epoch"] <= epochs
        ]
        kept.sort(key=lambda record: (record["stage"], record["epoch"]))
        if kept or self._metrics.exists():
            write_text(self._metrics, "".join(f"{json.dumps(record)}\n" for record in kept))
