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
from utils.run.folder import read_doubt, read_features, read_votes

_COVERED = 2000  # unlabeled images, drawn, that stand for all of them


class Suggestion(NamedTuple):
    """An image to label."""

    row: int  # of the candidates
    gain: float  # of the doubt, what a label explains that no earlier one does
    label: int  # class that the image itself is most in doubt about
    like: int  # unlabeled images that are like this one, more than like any other or labeled one


def suggest(
    doubt: np.ndarray, rarity: np.ndarray, features: np.ndarray, labeled: np.ndarray, count: int
) -> list[Suggestion]:
    """Choose images that resemble many in doubt, and of them those that no labeled one resembles.

    An image's label explains the doubt on others as far as they resemble it. They are chosen one
    after another, each the one that raises what is explained the most; of equal ones the first.

    Args:
        doubt: (N, C) >= 0, of the candidates by class.
        rarity: (C,) >= 0, what the doubt about a class counts.
        features: (N, D) float, of the candidates; they resemble one another by the cosine of what
            is left without the mean.
        labeled: (L, D) float, of the images that have labels.
        count: of suggestions, N at most.

    Returns:
        The suggestions, the best first. The images of fewer are the first ones of more.

    Source: greedy facility location (Wei, Iyer and Bilmes, Submodularity in data subset selection
    and active learning, ICML 2015), each image weighed by its doubt.
    """
    weights, mean = (doubt @ rarity).astype(np.float32), features.mean(axis=0)
    directions, known = _directions(features - mean), _directions(labeled - mean)
    drawn = np.random.default_rng(0).permutation(len(features))[:_COVERED]
    similar = directions[drawn] @ directions.T
    best = (directions[drawn] @ known.T).max(axis=1, initial=0.0)
    chosen, gains = list[int](), list[float]()
    for _ in range(count):
        gain = weights[drawn] @ np.maximum(similar - best[:, None], 0)
        gain[chosen] = -1
        chosen.append(int(gain.argmax()))
        gains.append(float(gain[chosen[-1]]))
        best = np.maximum(best, similar[:, chosen[-1]])
    own = similar[:, chosen]
    like = np.bincount(own.argmax(axis=1)[own.max(axis=1) >= best], minlength=count)
    like = np.round(like * len(features) / len(drawn)).astype(int)
    labels = (doubt[chosen] * rarity).argmax(axis=1)
    columns = chosen, gains, labels.tolist(), like.tolist()
    return [Suggestion(*row) for row in zip(*columns, strict=True)]


def _directions(rows: np.ndarray) -> np.ndarray:
    rows = rows.astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True).clip(1e-9)


def count_images(labeled: Sequence[Sample], classes: int) -> np.ndarray:
    """Return how many labeled images show each class: (C,) int."""

    def shown(sample: Sample) -> np.ndarray:
        pixels = np.asarray(read_label(sample)).ravel()
        return np.bincount(pixels, minlength=256)[:classes] > 0

    with ThreadPool() as pool:
        return np.sum(pool.map(shown, labeled), axis=0)


def write_suggestions(run: Path, count: int, out: Path) -> list[str]:
    """Write ``list.txt``, ``images.csv`` and ``sheet.png`` of the images to label next.

    A class counts one divided by one more than the labeled images that show it.

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
    kept = _read_stages(run, candidates, sorted(names), classes)
    shown = count_images(labeled, len(classes))
    found = suggest(kept.doubt, 1 / (1 + shown), kept.features, kept.labeled, count)
    chosen = [candidates[each.row] for each in found]
    lines = [line_of(sample._replace(mask=None), labels.root) for sample in chosen]
    write_lists(out, {"list": lines})
    head = ("image", "gain", "class", "doubt", "labeled_images_of_class", "like", "confidence")
    rows = [
        (
            sample.name,
            each.gain,
            classes[each.label],
            kept.doubt[each.row, each.label],
            shown[each.label],
            each.like,
            labels.confidence[sample.name],
        )
        for sample, each in zip(chosen, found, strict=True)
    ]
    write_csv(out / "images.csv", head, rows)
    voted = labels.config.pseudo_label.neighbours and read_votes(run / "2_votes")["votes"] > 0
    who = "teacher and votes disagree on" if voted else "the teacher is unsure of"
    whys = [
        f"{who} '{row[2]}' ({row[3]:.2f}), in {row[4]} of {len(labeled)} labeled images; "
        f"{row[5]} of {len(candidates)} images are most like it"
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


class _Kept(NamedTuple):
    """What labeling stages have kept of images."""

    doubt: np.ndarray  # (N, C) of the candidates
    features: np.ndarray  # (N, D) of the candidates
    labeled: np.ndarray  # (L, D) features of labeled images


def _read_stages(
    run: Path, candidates: Sequence[Sample], labeled: Sequence[str], classes: Sequence[str]
) -> _Kept:
    doubts = dict[str, np.ndarray]()
    for stage in (run / name for name in STAGES):
        if (stage / "confidence.csv").is_file():  # the stage has ended
            doubts |= read_doubt(stage, classes)
    features = read_features(run / STAGES[0])
    seen = [features[name] for name in labeled if name in features]
    if not seen or not all(sample.name in features for sample in candidates):
        raise UserError(
            f"{run / STAGES[0] / 'features.npz'}: has not all images, or none of the labeled ones; "
            f"do the stage and later ones again with --from-stage 2, in a copy of {run} to keep it"
        )
    doubt = np.array([doubts[sample.name] for sample in candidates])
    return _Kept(doubt, np.array([features[x.name] for x in candidates]), np.array(seen))


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
