"""One stage of a run, as the function that does it sees it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from utils import checkpoint
from utils.config import Config
from utils.optimization import Optimization
from utils.precision import Device

Report = dict[str, Any]  # what results.json says of a stage


@dataclass(frozen=True)
class Stage:
    """Where a stage works and what it may ask for.

    Attributes:
        name: of the stage and of its folder; begins with the stage's number.
        folder: what the stage makes goes here.
        config: the run's settings.
        device: where and in which precision networks run.
        record: keeps an epoch's numbers; called with the epoch and the numbers.
    """

    name: str
    folder: Path
    config: Config
    device: Device
    record: Callable[[int, dict[str, float]], None]

    def save(self, net: nn.Module, epoch: int) -> None:
        """Write ``checkpoint.pth``: weights, config, stage, and how many epochs they saw."""
        content = {"model": net.state_dict(), "config": self.config.model_dump(mode="json")}
        checkpoint.save(checkpoint_of(self.folder), {**content, "stage": self.name, "epoch": epoch})

    def suspend(
        self, net: nn.Module, optimization: Optimization, epoch: int, report: Report
    ) -> None:
        """Keep what going on after ``epoch`` epochs needs."""
        state = {"net": net.state_dict(), "optimization": optimization.state_dict()}
        checkpoint.save(self._state, {**state, "epoch": epoch, "report": report})

    def resume(self, net: nn.Module, optimization: Optimization) -> tuple[int, Report]:
        """Take up what was suspended; return how many epochs are done, and their report."""
        if not self._state.is_file():
            return 0, {}
        state = checkpoint.load(self._state)
        net.load_state_dict(state["net"])
        optimization.load_state_dict(state["optimization"])
        return state["epoch"], state["report"]

    def close(self) -> None:
        """Drop what was suspended: the stage is done."""
        self._state.unlink(missing_ok=True)

    @property
    def _state(self) -> Path:
        return self.folder / "resume.pth"


def checkpoint_of(folder: Path) -> Path:
    """Tell where a training stage's folder keeps its network."""
    return folder / "checkpoint.pth"
