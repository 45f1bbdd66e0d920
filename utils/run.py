"""The run folder: which stages are done, what they gave, and everything that is logged."""

import json
import shutil
import time
from collections.abc import Callable
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from utils.config import Config
from utils.errors import UserError
from utils.files import read_json, write_json, write_text
from utils.precision import Device
from utils.read_config import config_from
from utils.results import environment, stage_table
from utils.stage import Report, Stage

_FREE_KEYS = ("workers", "cache", "outdir")  # they change no result


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
        self.stages: dict[str, Report] = {}
        if from_stage != 1:
            self._refuse_other_config()
        if from_stage is not None:
            self._remove_stages(from_stage)
        write_text(self.folder / "config.yaml", yaml.safe_dump(config.model_dump(mode="json")))
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

    def stage(self, name: str, work: Callable[..., Report], *inputs: Any) -> Path:
        """Do a stage, unless it is done, and return its folder.

        Args:
            name: of the folder, which begins with the stage's number.
            work: called with the ``Stage`` and the inputs; fills the stage's folder and returns
                what results.json shall say of it.
            *inputs: for ``work``.
        """
        folder = self.folder / name
        done = folder / "stage.json"
        if done.is_file():
            self.say(f"{name}: done before")
        else:
            folder.mkdir(exist_ok=True)
            start = time.monotonic()
            write_json(self.folder / "environment.json", environment(self.device))
            record = partial(self._record, name)
            stage = Stage(name, folder, self.config, self.device, record)
            report = work(stage, *inputs)
            write_json(done, {**report, "seconds": round(time.monotonic() - start, 1)})
            stage.close()
        self.stages[name] = read_json(done)
        return folder

    def say(self, text: str) -> None:
        """Print a line above any progress bar, and keep it in log.txt."""
        tqdm.write(text)
        with (self.folder / "log.txt").open("a", encoding="utf-8") as log:
            log.write(f"{datetime.now(timezone.utc).isoformat(timespec='seconds')} {text}\n")

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

    def _record(self, stage: str, epoch: int, numbers: dict[str, float]) -> None:
        """Keep an epoch's numbers in metrics.jsonl, in TensorBoard and as a line of the log."""
        line = json.dumps({"stage": stage, "epoch": epoch, **numbers})
        with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as metrics:
            metrics.write(line + "\n")
        for key, value in numbers.items():
            self._board.add_scalar(f"{stage}/{key}", value, epoch)
        shown = "  ".join(f"{key} {value:.4g}" for key, value in numbers.items())
        self.say(f"{stage}  epoch {epoch}  {shown}")

    def _remove_stages(self, first: int) -> None:
        """Forget stages and what was said of them; a kill halfway leaves none that looks done."""
        folders = [f for f in sorted(self.folder.glob("[1-6]_*")) if int(f.name[0]) >= first]
        for name in ("results.json", "examples.png"):
            (self.folder / name).unlink(missing_ok=True)
        for folder in folders:
            (folder / "stage.json").unlink(missing_ok=True)
        for folder in folders:
            shutil.rmtree(folder)
        metrics = self.folder / "metrics.jsonl"
        if metrics.is_file():
            lines = metrics.read_text(encoding="utf-8").splitlines(keepends=True)
            write_text(metrics, "".join(x for x in lines if int(json.loads(x)["stage"][0]) < first))

    def _refuse_other_config(self) -> None:
        path = self.folder / "config.yaml"
        if not path.is_file() or not any(self.folder.glob("[1-6]_*/*")):
            return  # nothing has come of it yet
        kept = config_from(yaml.safe_load(path.read_text(encoding="utf-8")), str(path))
        there, here = (_flat(config.model_dump(mode="json")) for config in (kept, self.config))
        keys = sorted((there.keys() | here.keys()) - set(_FREE_KEYS))
        differing = [f"{key}={there.get(key)}" for key in keys if there.get(key) != here.get(key)]
        if differing:
            raise UserError(
                f"{self.folder}: holds a run with {', '.join(differing)}; set name=... for "
                "another run, or start this one over with --from-stage 1"
            )


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return {dotted key: value}."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat
