"""The run folder: which stages are done, what they gave, and everything that is logged."""

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torchvision
import yaml
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from utils.config import Config
from utils.errors import UserError
from utils.files import read_json, write_json, write_text
from utils.precision import Device

_FREE_KEYS = ("workers", "outdir")  # they change no result


class Run:
    """A folder ``<outdir>/<name>`` with a folder a stage. Use it in a ``with`` block.

    Args:
        config: the run's settings; kept as ``config.yaml``.
        from_stage: do stages of this number and later again; None goes on where the run stopped.

    Attributes:
        device: where and in which precision networks run.
        stages: what each finished stage reported, by its name.

    Raises:
        UserError: the folder holds a run with other settings; the device does not exist.
    """

    def __init__(self, config: Config, from_stage: int | None = None) -> None:
        self.config = config
        self.device = Device(config.device, config.precision)
        self.folder = Path(config.outdir) / config.name
        self.stages: dict[str, dict[str, Any]] = {}
        if from_stage != 1:
            self._refuse_other_config()
        if from_stage is not None:
            self._remove_stages(from_stage)
        write_text(self.folder / "config.yaml", yaml.safe_dump(config.model_dump(mode="json")))
        write_json(self.folder / "environment.json", self._environment())
        self._board = SummaryWriter(str(self.folder / "tensorboard"))

    def __enter__(self) -> "Run":
        """Open the run."""
        self.say(f"{self.folder} on {self.device}")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the logs."""
        self._board.close()

    def stage(self, name: str, work: Callable[..., dict[str, Any]], *inputs: Any) -> Path:
        """Do a stage, unless it is done, and return its folder.

        Args:
            name: of the folder, which begins with the stage's number.
            work: called with this run, the folder, and the inputs; fills the folder and returns
                what results.json shall say of the stage.
            *inputs: for ``work``.
        """
        folder = self.folder / name
        done = folder / "stage.json"
        if done.is_file():
            self.say(f"{name}: done before")
        else:
            folder.mkdir(exist_ok=True)
            start = time.monotonic()
            report = work(self, folder, *inputs)
            write_json(done, {**report, "seconds": round(time.monotonic() - start, 1)})
        self.stages[name] = read_json(done)
        return folder

    def say(self, text: str) -> None:
        """Print a line above any progress bar, and keep it in log.txt."""
        tqdm.write(text)
        with (self.folder / "log.txt").open("a", encoding="utf-8") as log:
            log.write(f"{datetime.now(timezone.utc).isoformat(timespec='seconds')} {text}\n")

    def record(self, stage: str, epoch: int, numbers: dict[str, float]) -> None:
        """Keep an epoch's numbers in metrics.jsonl, in TensorBoard and as a line of the log."""
        line = json.dumps({"stage": stage, "epoch": epoch, **numbers})
        with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as metrics:
            metrics.write(line + "\n")
        for key, value in numbers.items():
            self._board.add_scalar(f"{stage}/{key}", value, epoch)
        shown = "  ".join(f"{key} {value:.4g}" for key, value in numbers.items())
        self.say(f"{stage}  epoch {epoch}  {shown}")

    def finish(self) -> None:
        """Write results.json: the last stage's mIoU, and what every stage reported."""
        last = next(reversed(self.stages.values()))
        results = {
            "name": self.config.name,
            "checkpoint": self.config.evaluate.checkpoint,
            "miou": last["miou"],
            "per_class_iou": last["per_class_iou"],
            "stages": self.stages,
        }
        write_json(self.folder / "results.json", results)
        self.say(stage_table(self.stages, self.config.evaluate.checkpoint))

    def _remove_stages(self, first: int) -> None:
        for folder in self.folder.glob("[1-9]_*"):
            if int(folder.name[0]) >= first:
                shutil.rmtree(folder)

    def _refuse_other_config(self) -> None:
        kept = self.folder / "config.yaml"
        if not kept.is_file():
            return
        there, here = (
            _flat(yaml.safe_load(kept.read_text())),
            _flat(self.config.model_dump(mode="json")),
        )
        keys = sorted((there.keys() | here.keys()) - set(_FREE_KEYS))
        differing = [f"{key}={there.get(key)}" for key in keys if there.get(key) != here.get(key)]
        if differing:
            raise UserError(
                f"{self.folder}: holds a run with {', '.join(differing)}; set name=... for "
                "another run, or start this one over with --from-stage 1"
            )

    def _environment(self) -> dict[str, Any]:
        return {
            "command": sys.argv,
            "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "machine": platform.platform(),
            "device": str(self.device.device),
            "precision": self.device.precision,
            "threads": torch.get_num_threads(),
            "cores": os.cpu_count(),
            "commit": _git("rev-parse", "HEAD"),
            "dirty": bool(_git("status", "--porcelain")),
        }


def stage_table(stages: dict[str, dict[str, Any]], checkpoint: str) -> str:
    """Lay out what the stages reported, a line each.

    Coverage is the share of the unlabeled images that the stage labeled or learnt from,
    confidence the mean probability of the pseudo labels, weight the mean over pixels of what
    rectification leaves of their loss in the last epoch.
    """
    columns = ("miou", "images", "coverage", "confidence", "weight", "seconds")
    titles = (f"mIoU ({checkpoint})", "images", "coverage", "confidence", "weight", "time")
    lines = [f"{'stage':<16}" + "".join(f"{title:>13}" for title in titles)]
    for name, report in stages.items():
        cells = [_cell(column, report.get(column)) for column in columns]
        lines.append(f"{name:<16}" + "".join(f"{cell:>13}" for cell in cells))
    return "\n".join(lines)


def _cell(column: str, value: float | None) -> str:
    if value is None:
        return "-"
    if column == "seconds":
        return f"{int(value) // 60}:{int(value) % 60:02d}"
    return str(value) if column == "images" else f"{100 * value:.2f} %"


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return {dotted key: value}."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def _git(*words: str) -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), *words]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
