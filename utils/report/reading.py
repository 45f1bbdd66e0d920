"""What the report knows of a run, read from its folder; what is missing there is missing here."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps

from utils.config.schema import Config
from utils.errors import UserError
from utils.run.comparison import differing_keys
from utils.run.folder import (
    number_in,
    read_diagnosis,
    read_environment,
    read_epochs,
    read_kept,
    read_scores,
    read_stages,
    read_table,
    rounds_of,
    stage_again,
)

_AGAIN = "delete the run's folder val, and the run's command, typed again, makes it anew"


class PredictedImage(NamedTuple):
    """A validation image and the files that show it."""

    name: str
    miou: float  # in [0, 1]; NaN if no pixel counts
    picture: Path | None  # None: its file is not in the data root
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
    rounds: list["RunFolder"] = field(default_factory=list)  # that have ended, the oldest first

    @property
    def name(self) -> str:
        """The run's name."""
        return self.config.name

    @property
    def mious(self) -> dict[str, float]:
        """The mIoU on val of each training stage that has ended, in percent."""
        return {name: 100 * self.stages[name]["miou"] for name in _validated(self.stages)}

    @cached_property
    def selection(self) -> tuple[list[float], int]:
        """Return stage 3's scores of unlabeled images, the best first, and how many are kept."""
        if "3_select" not in self.stages:
            return [], 0
        kept = self.folder / "3_select" / "reliable.txt"
        try:
            count = len(kept.read_text("utf-8").splitlines())
        except (OSError, ValueError):
            raise UserError(f"{kept}: cannot read this list; {stage_again('3_select')}") from None
        return sorted(read_scores(self.folder).values(), reverse=True), count


def read_run(folder: Path) -> RunFolder:
    """Read a run folder.

    Raises:
        UserError: it is none; no training stage has ended; a file of it is damaged.
    """
    config, stages = read_kept(folder), read_stages(folder)
    trained = _validated(stages)
    if not trained:
        raise UserError(f"{folder}: no stage has ended; continue the run first")
    places = [folder / "val" / name for name in trained]
    places = [place for place in places if place.exists()]
    found = [_predictions(place, config.dataset.root) for place in places[:1] + places[1:][-1:]]
    _refuse_other_lists(folder, found)
    # The newest last: epoch_1000 after epoch_990.
    drawn = {
        name: sorted((folder / name / "panels").glob("epoch_*.png"), key=lambda x: (len(x.name), x))
        for name in stages
    }
    return RunFolder(
        folder,
        config,
        (folder / "config.yaml").read_text("utf-8"),
        stages,
        read_epochs(folder, stages),
        read_environment(folder),
        found,
        {name: files[-1] for name, files in drawn.items() if files},
        read_diagnosis(folder),
        [read_run(ended) for ended in rounds_of(folder)],
    )


def _validated(stages: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the stages with an mIoU on val; folds have theirs on labeled images."""
    scored = [name for name, report in stages.items() if report.get("miou") is not None]
    return [name for name in scored if "fold" not in name]


def _predictions(place: Path, root: str) -> Predictions:
    (_, *classes), rows = read_table(place / "confusion.csv", (), _AGAIN)
    try:
        confusion = np.array([[int(count) for count in row[1:]] for row in rows], np.int64)
    except (ValueError, OverflowError):
        confusion = np.zeros(0, np.int64)
    square = confusion.shape == (len(classes), len(classes)) and [row[0] for row in rows] == classes
    if not classes or not square or confusion.min() < 0:
        raise UserError(
            f"{place / 'confusion.csv'}: holds no counts of classes by classes; {_AGAIN}"
        )
    path, columns = place / "images.csv", ("image", "miou", "pixel_accuracy", "picture", "label")
    images = []
    for name, miou, _, picture, label in read_table(path, columns, _AGAIN)[1]:
        if not _stays_inside(name) or not _stays_inside(label):
            raise UserError(f"{path}: {name} or {label} leads out of its folder; {_AGAIN}")
        images.append(
            PredictedImage(
                name,
                number_in(miou, path, _AGAIN, 0) if miou else np.nan,
                Path(picture) if _is_of_root(picture, root, name) else None,
                place.parent / label,
                place / "masks" / PurePosixPath(name).with_suffix(".png"),
            )
        )
    return Predictions(place.name, classes, confusion, images)


def _stays_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return bool(path.name) and not path.is_absolute() and ".." not in path.parts


def _is_of_root(picture: str, root: str, name: str) -> bool:
    """Tell whether a picture's path is that of an image of the data root.

    A relative root counts from the folder where the run was started, which is not known here.
    """
    expected = [part for part in Path(os.path.normpath(Path(root) / name)).parts if part != ".."]
    return list(Path(os.path.normpath(picture)).parts[-len(expected) :]) == expected


def _refuse_other_lists(folder: Path, found: Sequence[Predictions]) -> None:
    lists = [(each.classes, sorted(image.name for image in each.images)) for each in found]
    if lists[1:] and lists[0] != lists[1]:
        raise UserError(
            f"{folder / 'val'}: {found[0].stage} and {found[1].stage} have other classes or "
            f"images; {_AGAIN}"
        )


def read_picture(path: Path) -> Image.Image:
    """Read a picture that the report shows, upright; a mask stays one.

    Raises:
        UserError: it cannot be read.
    """
    try:
        with Image.open(path) as picture:
            return ImageOps.exif_transpose(picture)
    except Exception as error:  # decoders raise OSError, ValueError, SyntaxError and their own
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise UserError(f"{path}: cannot read this picture ({reason}); restore it") from None


def read_mask(path: Path, size: tuple[int, int] | None = None) -> tuple[np.ndarray, bytes]:
    """Read a mask of a run.

    Args:
        path: a palette PNG below ``val``.
        size: (width, height) that it must have; None: any.

    Returns:
        (H, W) uint8 class ids, and 768 bytes of palette.

    Raises:
        UserError: it cannot be read, is none, or has another size.
    """
    mask = read_picture(path)
    if mask.mode != "P" or size not in (None, mask.size):
        raise UserError(f"{path}: is no mask of its image; {_AGAIN}")
    return np.asarray(mask), bytes(mask.getpalette()).ljust(768, b"\0")


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
