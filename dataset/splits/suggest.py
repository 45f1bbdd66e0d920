"""Suggest which unlabeled images to label next, from what a run leaves in its folder."""

import shlex
from collections.abc import Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from dataset.catalog import DatasetInfo
from dataset.lists import Sample, line_of, read_label, read_lists, read_sample, write_lists
from dataset.pseudo_labels import STAGES, read_pseudo_labels
from utils.errors import UserError
from utils.files import write_csv
from utils.panels import overlay, panel, save
from utils.run.folder import ImageDoubt, read_doubt, read_votes

_ROUNDS = 50  # of k-means, at most


class Suggestion(NamedTuple):
    """An image to label."""

    row: int  # of the candidates
    score: float  # doubt, each class by its rarity
    label: int  # class that adds most to the score


def suggest(
    doubt: np.ndarray, rarity: np.ndarray, clusters: np.ndarray, count: int
) -> list[Suggestion]:
    """Choose images one after another: doubtful in rare classes, and of many clusters.

    Each choice has the highest score divided by one more than the images of its cluster that are
    chosen before; of equal ones it is the first.

    Args:
        doubt: (N, C) >= 0, of the candidates by class.
        rarity: (C,) >= 0, what the doubt about a class counts.
        clusters: (N,) int >= 0, which candidates look alike.
        count: of suggestions, N at most.

    Returns:
        The suggestions, the best first.
    """
    scores, left, found = doubt @ rarity, np.ones(len(doubt), bool), list[Suggestion]()
    chosen = np.zeros(clusters.max() + 1)  # by cluster
    for _ in range(count):
        row = int(np.where(left, scores / (1 + chosen[clusters]), -1.0).argmax())
        found.append(Suggestion(row, float(scores[row]), int((doubt[row] * rarity).argmax())))
        left[row] = False
        chosen[clusters[row]] += 1
    return found


def cluster(features: np.ndarray, count: int) -> np.ndarray:
    """Group rows that are near by k-means; the same rows give the same groups.

    Args:
        features: (N, D) float.
        count: of groups, N at most; fewer come back where rows are equal.

    Returns:
        (N,) int from 0 on, group of each row.

    Source: Lloyd (1982), begun as k-means++ (Arthur and Vassilvitskii, 2007).
    """
    rng, groups = np.random.default_rng(0), np.zeros(len(features), int)
    centers = features[[rng.integers(len(features))]]
    while len(centers) < count:
        nearest = _distances(features, centers).min(axis=1)
        if not nearest.sum() > 0:
            break
        chance = nearest / nearest.sum()
        centers = np.concatenate([centers, features[[rng.choice(len(features), p=chance)]]])
    for _ in range(_ROUNDS):
        before, groups = groups, _distances(features, centers).argmin(axis=1)
        if np.array_equal(before, groups):
            break
        filled = np.unique(groups)
        centers[filled] = [features[groups == group].mean(axis=0) for group in filled]
    return np.unique(groups, return_inverse=True)[1]


def _distances(rows: np.ndarray, centers: np.ndarray) -> np.ndarray:
    """Return the squared distances of (N, D) rows to (K, D) centers: (N, K), 0 where equal."""
    squares = [np.square(each.astype(float)).sum(axis=1) for each in (rows, centers)]
    found = squares[0][:, None] + squares[1] - 2 * rows.astype(float) @ centers.T.astype(float)
    return np.where(found < 1e-9, 0.0, found)


def count_images(labeled: Sequence[Sample], classes: int) -> np.ndarray:
    """Return how many labeled images show each class: (C,) int."""

    def shown(sample: Sample) -> np.ndarray:
        pixels = np.asarray(read_label(sample)).ravel()
        return np.bincount(pixels, minlength=256)[:classes] > 0

    with ThreadPool() as pool:
        return np.sum(pool.map(shown, labeled), axis=0)


def write_suggestions(run: Path, count: int, out: Path) -> list[str]:
    """Write ``list.txt``, ``images.csv`` and ``sheet.png`` of the images to label next.

    A class counts one divided by one more than the labeled images that show it. There are as many
    clusters as the root of the number of candidates.

    Returns:
        What was written, and why each image is suggested, in lines.

    Raises:
        UserError: no run, no data or no pseudo labels; a run of an earlier version; fewer images
            than wanted; another list is there already.
    """
    labels = read_pseudo_labels(run)
    labeled = read_lists(labels.config.dataset, ("labeled",)).labeled
    names, classes = {sample.name for sample in labeled}, labels.kind.classes
    candidates = [sample for sample in labels.samples if sample.name not in names]
    if not 0 < count <= len(candidates):
        raise UserError(
            f"--count: {count} is not from 1 to {len(candidates)}, the images of {run} with pseudo "
            "labels and without labels"
        )
    _refuse_files_of_others(out)
    kept = dict[str, ImageDoubt]()
    for stage in (run / name for name in STAGES):
        if (stage / "confidence.csv").is_file():  # the stage has ended
            kept |= read_doubt(stage, classes)
    doubt = np.array([kept[sample.name].by_class for sample in candidates])
    features = np.array([kept[sample.name].features for sample in candidates])
    shown = count_images(labeled, len(classes))
    clusters = cluster(features, round(len(candidates) ** 0.5))
    found = suggest(doubt, 1 / (1 + shown), clusters, count)
    chosen = [candidates[each.row] for each in found]
    lines = [line_of(sample._replace(mask=None), labels.root) for sample in chosen]
    write_lists(out, {"list": lines})
    head = ("image", "score", "class", "doubt", "labeled_images_of_class", "cluster", "confidence")
    rows = [
        (
            sample.name,
            each.score,
            classes[each.label],
            doubt[each.row, each.label],
            shown[each.label],
            clusters[each.row] + 1,
            labels.confidence[sample.name],
        )
        for sample, each in zip(chosen, found, strict=True)
    ]
    write_csv(out / "images.csv", head, rows)
    voted = labels.config.pseudo_label.neighbours and read_votes(run / "2_votes")["votes"] > 0
    who = "teacher and votes disagree on" if voted else "the teacher is unsure of"
    whys = [
        f"{who} '{row[2]}' ({row[3]:.2f}), in {row[4]} of {len(labeled)} labeled images; cluster "
        f"{row[5]} of {clusters.max() + 1}"
        for row in rows
    ]
    save(_sheet(chosen, whys, labels.kind), out / "sheet.png")
    words = [str(run), "--to", "labelme", "--images", str(out / "list.txt")]
    return [
        f"{out}: list.txt, images.csv and sheet.png of {count} of {len(candidates)} images",
        *(f"{sample.name}: {why}" for sample, why in zip(chosen, whys, strict=True)),
        "to correct their pseudo labels in a tool:",
        f"  python -m dataset.prepare export-labels {shlex.join(words)}",
    ]


def _refuse_files_of_others(out: Path) -> None:
    """Refuse a table and a sheet that no list, which is compared, stands beside."""
    for path in (out / "images.csv", out / "sheet.png"):
        if path.exists() and not (out / "list.txt").exists():
            raise UserError(f"{path}: is there already; move it away, or name another --out")


def _sheet(samples: Sequence[Sample], notes: Sequence[str], kind: DatasetInfo) -> Image.Image:
    palette, rows = kind.palette(), []
    for sample, note in zip(samples, notes, strict=True):
        image, mask = read_sample(sample)
        rows.append([(image, sample.name), (overlay(image, np.asarray(mask), palette), note)])
    legend = list(zip(kind.classes, kind.colours, strict=True))
    return panel(["image", "pseudo label, white: doubtful"], rows, legend, height=240)
