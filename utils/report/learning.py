"""The learning curve: mIoU against the number of labeled images, over the rounds of runs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from utils.report import figures
from utils.report.reading import Predictions, RunFolder, read_mask
from utils.scores import RESAMPLES, blocks_of, miou_interval, resample


class Point(NamedTuple):
    """A result of a run: that of an ended round, or the one in its folder."""

    run: str
    round: int  # from 1 on
    labeled: int  # images
    stage: str  # whose network it is
    miou: float  # in percent
    low: float  # of the 95 % interval, in percent; NaN where the predictions are gone
    high: float


def learning_curve(runs: Sequence[RunFolder]) -> dict[str, Any] | None:
    """Return plot and table of the results by number of labeled images.

    None where all results are of one number, or of an earlier version, which did not keep it.
    """
    found = [(run, [*run.rounds, run]) for run in runs]
    counts = {_labeled(each) for _, rounds in found for each in rounds} - {None}
    if len(counts) < 2:
        return None
    lines = {run.folder: _points(run.name, rounds) for run, rounds in found}
    points = [point for line in lines.values() for point in line]
    rows = [["run", "round", "labeled images", "stage", "mIoU", "95 % interval"]]
    for point in points:
        known = point.low == point.low
        interval = f"{point.low:.1f} to {point.high:.1f}" if known else "not known"
        numbers = (str(point.round), str(point.labeled), point.stage, f"{point.miou:.1f}")
        rows.append([point.run, *numbers, interval])
    told = (
        f"mIoU of val in %, of the last stage that has ended. Intervals are by {RESAMPLES:,} "
        "resamples of the validation images; another seed of training differs beyond them."
    )
    plot = figures.learning([line for line in lines.values() if line])
    return {"plot": plot, "rows": rows, "told": told}


def _labeled(run: RunFolder) -> int | None:
    return run.stages.get("1_supervised", {}).get("labeled_images")


def _points(name: str, rounds: Sequence[RunFolder]) -> list[Point]:
    points = []
    for number, run in enumerate(rounds, start=1):
        labeled, (stage, miou) = _labeled(run), list(run.mious.items())[-1]
        if labeled is not None:
            known = run.predictions and run.predictions[-1].stage == stage
            bounds = _interval(run.predictions[-1]) if known else (np.nan, np.nan)
            points.append(Point(name, number, labeled, stage, miou, *bounds))
    return points


def _interval(predictions: Predictions) -> tuple[float, float]:
    """Return the bounds of mIoU, in percent; NaN where a mask is gone."""
    files = [(image.label, image.mask) for image in predictions.images]
    if not all(path.is_file() for pair in files for path in pair):
        return np.nan, np.nan
    overlaps = np.stack([_overlap(*pair, len(predictions.classes)) for pair in files])
    blocks = blocks_of([image.name for image in predictions.images])
    _, low, high = miou_interval(overlaps, resample(blocks))
    return 100 * low, 100 * high


def _overlap(label: Path, mask: Path, classes: int) -> np.ndarray:
    """Count intersection and union of each class in an image's files: (C, 2) int64 pixels."""
    true, _ = read_mask(label)
    found, _ = read_mask(mask, true.shape[::-1])
    valid = (true < classes) & (found < classes)
    true, found = true[valid], found[valid]
    hits, *areas = (
        np.bincount(ids, minlength=classes) for ids in (true[true == found], true, found)
    )
    return np.stack([hits, areas[0] + areas[1] - hits], axis=1)
