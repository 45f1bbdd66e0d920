"""Where curves and pictures of a run go: TensorBoard, Weights & Biases. One axis of iterations."""

import uuid
from collections.abc import Mapping
from pathlib import Path
from shutil import rmtree
from typing import Any, Protocol

import numpy as np
import yaml
from PIL import Image
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from utils.config.reading import flatten
from utils.config.schema import Config
from utils.errors import UserError
from utils.files import write_text, writing

_LOSSES = {"ce", "consistency", "unlabeled", "labeled"}  # of the numbers of an epoch


class Logger(Protocol):
    """What takes a run's numbers; iterations count on from one training stage to the next."""

    def scalars(self, values: Mapping[str, float], iteration: int) -> None:
        """Take numbers by tag, such as ``loss/ce`` and ``iou/cat``."""

    def picture(self, tag: str, picture: Image.Image, iteration: int) -> None:
        """Take an RGB picture."""

    def result(self, miou: float) -> None:
        """Take the run's mIoU in [0, 1], beside its settings."""

    def close(self) -> None:
        """Write what is not written yet."""


def open_loggers(folder: Path, config: Config) -> list[Logger]:
    """Open the loggers that ``tensorboard`` and ``wandb`` name, in a run's folder.

    Raises:
        UserError: as ``WeightsAndBiases``.
    """
    loggers: list[Logger] = (
        [TensorBoard(folder / "tensorboard", config)] if config.tensorboard else []
    )
    return loggers + ([] if config.wandb is None else [WeightsAndBiases(folder, config)])


def add_tags(
    stage: str, numbers: Mapping[str, float], ious: Mapping[str, float | None]
) -> dict[str, float]:
    """Name an epoch's numbers for loggers.

    Args:
        stage: its name, which begins with its number; logged as ``stage``.
        numbers: means of an epoch.
        ious: IoU in [0, 1] by class name; None for a class that is not seen, which is left out.
    """
    named = {f"loss/{key}" if key in _LOSSES else key: value for key, value in numbers.items()}
    by_class = {f"iou/{name}": value for name, value in ious.items() if value is not None}
    return {**named, **by_class, "stage": int(stage[0])}


class TensorBoard:
    """Event files: scalars, pictures, the config as text, hyperparameters with the final mIoU."""

    def __init__(self, folder: Path, config: Config) -> None:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._config = folder, config
        self._writer: SummaryWriter | None = None

    def _at(self, iteration: int) -> SummaryWriter:
        """Open at the first iteration that is logged: what was logged from there on counts no more.

        A run that continues repeats what it did after its last saved state.
        """
        if self._writer is None:
            self._writer = SummaryWriter(str(self._folder), purge_step=iteration)
            text = yaml.safe_dump(self._config.model_dump(mode="json"), sort_keys=False)
            self._writer.add_text("config", f"```yaml\n{text}```", iteration)
        return self._writer

    def scalars(self, values: Mapping[str, float], iteration: int) -> None:
        """Take numbers by tag."""
        with writing(self._folder):
            for tag, value in values.items():
                self._at(iteration).add_scalar(tag, value, iteration)

    def picture(self, tag: str, picture: Image.Image, iteration: int) -> None:
        """Take an RGB picture."""
        with writing(self._folder):
            self._at(iteration).add_image(tag, np.asarray(picture), iteration, dataformats="HWC")

    def result(self, miou: float) -> None:
        """Write the hyperparameters as a run of their own, as TensorBoard wants it."""
        place, metrics = self._folder / "hparams", {"final_miou": miou}
        with writing(place):
            rmtree(place, ignore_errors=True)  # of an earlier result
            with SummaryWriter(str(place)) as writer:
                for summary in hparams(_hyperparameters(self._config), metrics):
                    writer.file_writer.add_summary(summary)
                writer.add_scalar("final_miou", miou)

    def close(self) -> None:
        """Write what is not written yet."""
        if self._writer is not None:
            with writing(self._folder):
                self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases, continued under the same id; ``WANDB_MODE=offline`` sends nothing.

    Raises:
        UserError: the package is not installed, nobody is logged in, or the project's name is
            not allowed.
    """

    def __init__(self, folder: Path, config: Config) -> None:
        try:
            import wandb
        except ImportError:
            raise UserError(
                "wandb: the package is not installed; pip install wandb, or set wandb=null"
            ) from None
        self._wandb, name = wandb, folder / "wandb" / "id"
        if not name.is_file():
            write_text(name, uuid.uuid4().hex[:8])
        try:
            self._run = wandb.init(
                project=config.wandb,
                name=config.name,
                id=name.read_text(encoding="utf-8"),
                resume="allow",
                dir=str(folder),
                config=config.model_dump(mode="json"),
                settings=wandb.Settings(silent=True, console="off"),
            )
        except wandb.errors.Error as error:
            reason = str(error).strip().partition("\n")[0].rstrip(".")
            raise UserError(
                f"wandb: {reason}; correct wandb=PROJECT, type 'wandb login', or set "
                "WANDB_MODE=offline or wandb=null"
            ) from error
        # Its own steps may not repeat, as iterations do after a kill.
        self._run.define_metric("*", step_metric="iteration")

    def scalars(self, values: Mapping[str, float], iteration: int) -> None:
        """Take numbers by tag."""
        self._run.log({**values, "iteration": iteration})

    def picture(self, tag: str, picture: Image.Image, iteration: int) -> None:
        """Take an RGB picture."""
        self._run.log({tag: self._wandb.Image(picture), "iteration": iteration})

    def result(self, miou: float) -> None:
        """Put the result beside the settings in the table of runs."""
        self._run.summary["final_miou"] = miou

    def close(self) -> None:
        """Write what is not written yet."""
        self._run.finish()


def _hyperparameters(config: Config) -> dict[str, Any]:
    """Return the settings as TensorBoard takes them: numbers, booleans and text by dotted key."""
    settings = flatten(config.model_dump(mode="json"))
    return {k: v if isinstance(v, int | float | str) else str(v) for k, v in settings.items()}
