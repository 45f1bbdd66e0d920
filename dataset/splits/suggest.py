"""Suggest which unlabeled images to label next, from what a run leaves in its folder."""

import shlex
from collections.abc import Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from dataset.catalog import DatasetInfo
from dataset.lists import Sample, line_of, read_lists, read_sample, write_lists
from dataset.pseudo_labels import read_pseudo_labels
from utils.errors import UserError
from utils.files import write_csv
from utils.panels import overlay, panel, save

_SIDE = 4  # pixels, of the thumbnails that tell images apart


class Suggestion(NamedTuple):
    """An image to label."""

    row: int  # of the candidates
    score: float  # doubtful share of the pixels, each weighted by the rarity of its class
    distance: float  # to the nearest image that is labeled or suggested before


def suggest(
    doubt: np.ndarray, rarity: np.ndarray, features: np.ndarray, known: np.ndarray, count: int
) -> list[Suggestion]:
    """Choose images one after another: doubtful in rare classes, and unlike those before.

    Each choice has the highest product of score and distance; of equal ones the first.

    Args:
        doubt: (N, C) in [0, 1], share of a candidate's pixels that are doubtful and likely of a
            class.
        rarity: (C,) >= 0, what a doubtful pixel of a class counts.
        features: (N, D) of the candidates; images that look alike are near.
        known: (M, D) of the labeled images, one at least.
        count: of suggestions, N at most.

    Returns:
        The suggestions, the best first.
    """
    scores, left, found = doubt @ rarity, np.ones(len(features), bool), list[Suggestion]()
    distance = np.min([np.linalg.norm(features - one, axis=1) for one in known], axis=0)
    for _ in range(count):
        row = int(np.where(left, scores * distance, -1.0).argmax())
        found.append(Suggestion(row, float(scores[row]), float(distance[row])))
        left[row] = False
        distance = np.minimum(distance, np.linalg.norm(features - features[row], axis=1))
    return found


class Look(NamedTuple):
    """What tells images from others, an image a row."""

    thumbnails: np.ndarray  # (N, 48) float in [0, 1]
    shares: np.ndarray  # (N, C + 1) float, of the pixels by class; the last is of those ignored


def look_at(samples: Sequence[Sample], classes: int) -> Look:
    """Read images and their masks."""

    def one(sample: Sample) -> tuple[np.ndarray, np.ndarray]:
        image, mask = read_sample(sample)
        thumbnail = image.resize((_SIDE, _SIDE), Image.Resampling.BOX, reducing_gap=2)
        ids = np.minimum(np.asarray(mask), classes).ravel()
        return np.asarray(thumbnail).ravel() / 255, np.bincount(
            ids, minlength=classes + 1
        ) / ids.size

    with ThreadPool() as pool:
        return Look(*map(np.stack, zip(*pool.map(one, samples), strict=True)))


def doubt_of(shares: np.ndarray, confidence: np.ndarray) -> np.ndarray:
    """Spread the doubt about images over the classes that their pseudo labels show.

    Args:
        shares: (N, C + 1) as in ``Look``.
        confidence: (N,) mean probability of the pixels' classes.

    Returns:
        (N, C) in [0, 1], as ``suggest`` takes it; all classes alike where every pixel is ignored.
    """
    stored = shares[:, :-1]
    total = stored.sum(axis=1, keepdims=True)
    alike = np.full_like(stored, 1 / stored.shape[1])
    return (1 - confidence[:, None]) * np.divide(stored, total, out=alike, where=total > 0)


def features_of(known: Look, other: Look) -> tuple[np.ndarray, np.ndarray]:
    """Return rows of both that are near where images look alike and show the same.

    Thumbnails and shares count the same: the variance of each, over the rows of both, adds up to 1.
    """
    parts = []
    for one, two in zip(known, other, strict=True):
        both = np.sqrt(np.concatenate([one, two]))  # of shares: Hellinger's distance
        parts.append(both / max(1e-6, np.sqrt(both.var(axis=0).sum())))
    rows = np.concatenate(parts, axis=1)
    return rows[: len(known.shares)], rows[len(known.shares) :]


def write_suggestions(run: Path, count: int, out: Path) -> list[str]:
    """Write ``list.txt``, ``images.csv`` and ``sheet.png`` of the images to label next.

    A doubtful pixel counts one divided by one more than the labeled images that show its class.

    Returns:
        What was written, and why each image is suggested, in lines.

    Raises:
        UserError: no run, no data or no pseudo labels; fewer images than wanted; another list is
            there already.
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
    known, look = look_at(labeled, len(classes)), look_at(candidates, len(classes))
    confidence = np.array([labels.confidence[sample.name] for sample in candidates])
    shown = np.count_nonzero(known.shares[:, :-1], axis=0)  # labeled images of each class
    doubt, rarity = doubt_of(look.shares, confidence), 1 / (1 + shown)
    near, features = features_of(known, look)
    found = suggest(doubt, rarity, features, near, count)
    chosen = [candidates[each.row] for each in found]
    rarest = [int((doubt[each.row] * rarity).argmax()) for each in found]
    lines = [line_of(sample._replace(mask=None), labels.root) for sample in chosen]
    write_lists(out, {"list": lines})
    columns = ("image", "score", "distance", "confidence", "class", "labeled_images_of_class")
    rows = [
        (sample.name, each.score, each.distance, confidence[each.row], classes[label], shown[label])
        for sample, each, label in zip(chosen, found, rarest, strict=True)
    ]
    write_csv(out / "images.csv", columns, rows)
    whys = [
        f"probability {row[3]:.2f}, counts most for '{row[4]}' ({row[5]} labeled images show it)"
        for row in rows
    ]
    save(_sheet(chosen, whys, labels.kind), out / "sheet.png")
    words = [str(run), "--to", "labelme", "--images", str(out / "list.txt")]
    return [
        f"{out}: list.txt, images.csv and sheet.png of {count} of {len(candidates)} images",
        *(f"{sample.name}: mean {why}" for sample, why in zip(chosen, whys, strict=True)),
        "to correct their pseudo labels in a tool:",
        f"  python -m dataset.prepare export-labels {shlex.join(words)}",
    ]


def _sheet(samples: Sequence[Sample], notes: Sequence[str], kind: DatasetInfo) -> Image.Image:
    palette, rows = kind.palette(), []
    for sample, note in zip(samples, notes, strict=True):
        image, mask = read_sample(sample)
        rows.append([(image, sample.name), (overlay(image, np.asarray(mask), palette), note)])
    legend = list(zip(kind.classes, kind.colours, strict=True))
    return panel(["image", "pseudo label, white: doubtful"], rows, legend, height=240)
