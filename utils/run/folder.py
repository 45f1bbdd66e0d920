"""What a run folder holds, and reading it: one line for whatever is wrong with a file of it."""

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any
from zipfile import BadZipFile

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from utils.config.reading import read_config
from utils.config.schema import Config
from utils.errors import UserError
from utils.files import read_json, read_records

# 1_fold_1 and 1_fold_2 train teachers that leave a part of the labeled images out, 2_votes fits how
# far votes are believed, 5_votes how far beside the teacher of stage 5; all are there only where
# labeled patches vote.
STAGES = (
    *("1_supervised", "1_fold_1", "1_fold_2", "2_votes", "2_pseudo_label"),
    *("3_select", "4_retrain", "5_votes", "5_relabel", "6_retrain"),
)
VOTES_FILE = "votes.json"  # of 2_votes and 5_votes
# What a run makes beside its stages; other names in its folder are the user's.
_FILES = (
    *("config.yaml", "lists.json", "environment.json", "log.txt", "metrics.jsonl", "results.json"),
    *("diagnosis.json", "examples.png", "lock", "lock.holder"),
)
_FOLDERS = ("val", "tensorboard", "wandb", "rounds")
# What goes with a round that ends: first what tells that it has ended, last what dataset.splits
# suggests after it.
_STAYS = ("results.json", "lock", "lock.holder", "rounds")
ROUND = (
    "results.json",
    *(name for name in (*_FILES, *_FOLDERS) if name not in _STAYS),
    *(*STAGES, "suggested"),
)

# null, and NaN in files of earlier versions: there is no such number.
Share = Annotated[
    float | None,
    Field(ge=-1, le=1),
    BeforeValidator(lambda x: None if isinstance(x, float) and math.isnan(x) else x),
]


class _Record(BaseModel):
    """A JSON object of a run folder; keys that are not named here stay as they are."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)


class _Stage(_Record):
    miou: Share = None
    seconds: float = Field(0, ge=0)
    iterations: int = Field(1, gt=0)
    planned_iterations: int = Field(1, gt=0)
    labeled_images: int | None = Field(None, gt=0)


class _Group(_Record):
    weight: float
    right: float
    share: float


class _Weight(_Record):
    auroc: Share
    calibration_error: Share
    weight_on_wrong: Share
    curve: list[_Group]


class _Scored(_Record):
    miou: Share


class _Ended(_Stage):
    seconds: float = Field(ge=0)


class _Tested(_Record):
    miou: float = Field(ge=0, le=1)


class _Results(_Tested):
    stages: dict[str, _Ended] = Field(min_length=1)
    test: _Tested | None = None  # absent without dataset.test


class _Labels(_Scored):
    images: int
    share: Share
    pixel_accuracy: Share


class _Diagnosis(_Record):
    labels: dict[str, _Labels]
    classes: dict[str, _Scored]
    weights: dict[str, _Weight]
    rank_correlation: Share = None  # absent without stage 3


class _Fit(_Record):
    teacher: float
    votes: float
    cross_entropy: float
    cross_entropy_alone: float
    gain: float
    error: float
    miou: Share
    miou_alone: Share


class _Votes(_Record):
    factor: float = Field(gt=0)
    teacher: float = Field(ge=0)
    votes: float = Field(ge=0)
    fit: _Fit | None = None


def is_run_folder(folder: Path) -> bool:
    """Tell whether a run works or has worked in a folder."""
    others = (folder / name for name in ("lists.json", *STAGES))
    return (folder / "config.yaml").is_file() and any(path.exists() for path in others)


def rounds_of(folder: Path) -> list[Path]:
    """Return the folders of a run's ended rounds, the oldest first; each is a run folder."""
    found = [path for path in folder.glob("rounds/*") if path.name.isdecimal()]
    return sorted(found, key=lambda path: int(path.name))


def run_of(path: Path) -> Path | None:
    """Return the run folder whose own file or folder a path is; None if it is of no run.

    Args:
        path: absolute, without links; it need not exist.
    """
    names = {*_FILES, *_FOLDERS, *STAGES}
    for below, folder in zip([path, *path.parents], path.parents, strict=False):
        if below.name in names and is_run_folder(folder):
            return folder
    return None


def read_kept(folder: Path, overrides: Sequence[str] = ()) -> Config:
    """Read the config of a run folder, with overrides as in ``read_config``.

    Raises:
        UserError: it is no run folder; its config is damaged, or an override wrong.
    """
    kept = folder / "config.yaml"
    if not kept.is_file():
        raise UserError(f"{folder}: is no run folder (it has no config.yaml); name outdir/<name>")
    return read_config(str(kept.absolute()), overrides)


def read_stages(folder: Path) -> dict[str, dict[str, Any]]:
    """Read the reports of the stages that have ended, by name.

    Raises:
        UserError: one is damaged.
    """
    files = {name: folder / name / "stage.json" for name in STAGES}
    return {
        name: _read_object(file, _Stage, stage_again(name))
        for name, file in files.items()
        if file.exists()
    }


def read_diagnosis(folder: Path) -> dict[str, Any] | None:
    """Read what ``eval.py --diagnose`` left; None if there is nothing.

    Raises:
        UserError: it is damaged.
    """
    file = folder / "diagnosis.json"
    again = f"make it again with python eval.py {folder} --diagnose LIST, or delete it"
    return _read_object(file, _Diagnosis, again) if file.exists() else None


def read_results(folder: Path) -> dict[str, Any]:
    """Read what a run has come to.

    Raises:
        UserError: the run has not ended, or the file is damaged.
    """
    again = "delete it, and type the command again"
    return _read_object(folder / "results.json", _Results, again)


def read_environment(folder: Path) -> dict[str, Any]:
    """Read what a run notes of its machine; empty if there is nothing.

    Raises:
        UserError: it is damaged.
    """
    file = folder / "environment.json"
    return _read_object(file, _Record, "restore or delete it") if file.exists() else {}


def read_epochs(folder: Path, stages: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Read the numbers of the epochs of stages; lines that are none, and no numbers, are left out.

    Args:
        folder: of the run.
        stages: by name.

    Returns:
        ``stage``, ``epoch`` from 1 on, and finite numbers by name, an epoch each.
    """
    epochs = []
    for record in read_records(folder / "metrics.jsonl"):
        stage, epoch = record.get("stage"), record.get("epoch")
        if isinstance(stage, str) and stage in stages and isinstance(epoch, int) and epoch > 0:
            numbers = {
                key: value
                for key, value in record.items()
                if isinstance(value, int | float) and abs(value) < 1e300
            }
            epochs.append({**numbers, "stage": stage})
    return epochs


def read_table(path: Path, columns: Sequence[str], again: str) -> tuple[list[str], list[list[str]]]:
    """Read a CSV file of a run folder.

    Args:
        path: the file.
        columns: of its first line; none: any.
        again: what to do if the file is damaged.

    Returns:
        The first line, and the others; all have as many cells.

    Raises:
        UserError: no such file, no text, other columns, or a line with more or fewer cells.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            head, *rows = csv.reader(file)
    except (OSError, ValueError, csv.Error) as error:  # ValueError: no UTF-8, and no lines
        reason = getattr(error, "strerror", None) or "no table"
        raise UserError(f"{path}: cannot read this file ({reason}); {again}") from None
    if columns and head != list(columns):
        raise UserError(f"{path}: its columns are not {', '.join(columns)}; {again}")
    for number, row in enumerate(rows, start=2):
        if len(row) != len(head):
            raise UserError(f"{path}:{number}: has not {len(head)} cells; {again}")
    return head, rows


def read_votes(folder: Path) -> dict[str, Any]:
    """Read what ``fit_votes`` left in a stage's folder.

    Raises:
        UserError: it is missing or damaged.
    """
    return _read_object(folder / VOTES_FILE, _Votes, stage_again(folder.name))


def read_scores(folder: Path) -> dict[str, float]:
    """Read stage 3's score of every unlabeled image: -inf for one without; {} without stage 3.

    Raises:
        UserError: the file is damaged.
    """
    place, again, scores = folder / "3_select", stage_again("3_select"), {}
    if not (place / "stage.json").is_file():
        return scores
    path = place / "unlabeled_scores.csv"
    for name, score in read_table(path, ("image", "reliability"), again)[1]:
        scores[name] = number_in(score, path, again)
    return scores


def read_doubt(stage: Path, classes: Sequence[str]) -> dict[str, np.ndarray]:
    """Read ``doubt.csv`` of a labeling stage: by image name (C,) float in [0, 1].

    Args:
        stage: its folder.
        classes: names by class id.

    Raises:
        UserError: it is not there, as in runs of earlier versions, or damaged.
    """
    table, again = stage / "doubt.csv", stage_again(stage.name)
    if not table.is_file():
        raise UserError(
            f"{table}: no such file; runs of earlier versions have none: do the stage and later "
            f"ones again with --from-stage {stage.name[0]}, in a copy of {stage.parent} to keep it"
        )
    return {
        name: np.array([number_in(cell, table, again, 0) for cell in cells])
        for name, *cells in read_table(table, ("image", *classes), again)[1]
    }


def read_features(stage: Path) -> dict[str, np.ndarray]:
    """Read ``features.npz`` of a labeling stage: by image name (D,) float32 of length 1.

    Raises:
        UserError: it is not there, or damaged.
    """
    file = stage / "features.npz"
    try:
        with np.load(file) as content:
            rows = zip(content["images"].tolist(), content["features"], strict=True)
            return {name: row.astype(np.float32) for name, row in rows}
    except (OSError, ValueError, KeyError, TypeError, BadZipFile) as error:
        again = stage_again(stage.name)
        raise UserError(f"{file}: holds no features of its images ({error}); {again}") from None


def number_in(cell: str, path: Path, again: str, low: float = -math.inf) -> float:
    """Return the number in a cell of a table, which is not below a bound and no NaN.

    Raises:
        UserError: it is none.
    """
    try:
        value = float(cell)
    except ValueError:
        value = math.nan
    if not value >= low:
        raise UserError(f"{path}: {cell[:40]!r} is no such number; {again}")
    return value


def stage_again(name: str) -> str:
    """Say what to do about a damaged file of a stage."""
    return f"restore it, or do the stage and later ones again with --from-stage {name[0]}"


def _read_object(path: Path, kind: type[_Record], again: str) -> dict[str, Any]:
    if not path.exists():
        raise UserError(f"{path}: no such file; {again}")
    try:
        content = read_json(path)
        if not isinstance(content, dict):
            raise UserError(f"{path}: holds no JSON object; {again}")
        return kind.model_validate(content).model_dump(exclude_unset=True)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise UserError(f"{path}: {key}: {first['msg']}; {again}") from None
