"""What the report knows of a run, read from its folder; what is missing there is missing here."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from utils.config.reading import read_config
from utils.config.schema import Config
from utils.errors import UserError
from utils.files import read_json, read_records
from utils.run.comparison import differing_keys
from utils.run.folder import STAGES


class PredictedImage(NamedTuple):
    """A validation image and the files that show it."""

    name: str
    miou: float  # in [0, 1]; NaN if no pixel counts
    picture: Path
    label: Path  # palette PNG of class ids, 255 = ignored
    mask: Path  # the same of a network's prediction


@dataclass
class Predictions:
    """What a network predicts for the validation list."""

    stage: str
    classes: list[str]
    confusion: np.ndarray  # (C, C) int64 pixels: true class, predicted class
    images: list[PredictedImage]

    @property
    def iou(self) -> np.ndarray:
        """(C,) float64 in [0, 1]; NaN for a class that is not seen."""
        hits = np.diagonal(self.confusion)
        with np.errstate(invalid="ignore"):
            return hits / (self.confusion.sum(axis=0) + self.confusion.sum(axis=1) - hits)


@dataclass
class RunFolder:
    """A run: what is not there is empty or None."""

    folder: Path
    config: Config
    settings: str  # config.yaml
    stages: dict[str, dict[str, Any]]  # reports of those that have ended, by name
    epochs: list[dict[str, Any]]  # of metrics.jsonl
    environment: dict[str, Any]
    predictions: list[Predictions]  # of stage 1, then of the last stage if it is another one
    panels: dict[str, Path] = field(default_factory=dict)  # the newest of each stage
    diagnosis: dict[str, Any] | None = None

    @property
    def name(self) -> str:
        """The run's name."""
        return self.config.name

    @property
    def mious(self) -> dict[str, float]:
        """The mIoU of each training stage that has ended, in percent."""
        return {k: 100 * v["miou"] for k, v in self.stages.items() if v.get("miou") is not None}

    @cached_property
    def selection(self) -> tuple[list[float], int]:
        """Return stage 3's scores of unlabeled images, the best first, and how many are kept."""
        place = self.folder / "3_select"
        if "3_select" not in self.stages:
            return [], 0
        _, *rows = csv.reader((place / "unlabeled_scores.csv").read_text("utf-8").splitlines())
        scores = sorted((float(score) for _, score in rows), reverse=True)
        return scores, len((place / "reliable.txt").read_text("utf-8").splitlines())


def read_run(folder: Path) -> RunFolder:
    """Read a run folder.

    Raises:
        UserError: it is none; no training stage has ended; a file of it is damaged.
    """
    kept = folder / "config.yaml"
    if not kept.is_file():
        raise UserError(f"{folder}: is no run folder (it has no config.yaml); name outdir/<name>")
    reports = {x: folder / x / "stage.json" for x in STAGES}
    stages = {name: read_json(path) for name, path in reports.items() if path.is_file()}
    if not any("miou" in report for report in stages.values()):
        raise UserError(f"{folder}: no stage has ended; continue the run first")
    places = [folder / "val" / name for name in stages if "miou" in stages[name]]
    found = [_predictions(place) for place in places if (place / "confusion.csv").is_file()]
    # The newest last: epoch_1000 after epoch_990.
    drawn = {
        name: sorted((folder / name / "panels").glob("epoch_*.png"), key=lambda x: (len(x.name), x))
        for name in stages
    }
    environment, diagnosis = folder / "environment.json", folder / "diagnosis.json"
    return RunFolder(
        folder,
        read_config(str(kept)),
        kept.read_text("utf-8"),
        stages,
        [x for x in read_records(folder / "metrics.jsonl") if x.get("stage") in stages],
        read_json(environment) if environment.is_file() else {},
        found[:1] + found[1:][-1:],
        {name: files[-1] for name, files in drawn.items() if files},
        read_json(diagnosis) if diagnosis.is_file() else None,
    )


def _predictions(place: Path) -> Predictions:
    (_, *classes), *rows = csv.reader((place / "confusion.csv").read_text("utf-8").splitlines())
    confusion = np.array([[int(count) for count in row[1:]] for row in rows])
    with (place / "images.csv").open(encoding="utf-8", newline="") as file:
        images = [
            PredictedImage(
                row["image"],
                float(row["miou"] or "nan"),
                Path(row["picture"]),
                place.parent / row["label"],
                place / "masks" / PurePosixPath(row["image"]).with_suffix(".png"),
            )
            for row in csv.DictReader(file)
        ]
    return Predictions(place.name, classes, confusion, images)


def by_method(runs: Sequence[RunFolder]) -> dict[str, list[RunFolder]]:
    """Group runs that differ in nothing but their seed, under the first one's name without it."""
    groups: dict[str, list[RunFolder]] = {}
    for run in runs:
        for members in groups.values():
            one, other = members[0].config, run.config
            alike = one.dataset == other.dataset and one.precision == other.precision
            if alike and {*differing_keys(one, other)} <= {"seed"}:
                members.append(run)
                break
        else:
            title = run.name.removesuffix(f"_{run.config.seed}")
            groups[title if title not in groups else run.name] = [run]
    return groups
