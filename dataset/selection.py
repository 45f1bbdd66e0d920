"""Stage 3's outcome: reliable and unreliable images, and the guides that are kept."""

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from dataset.query import QueryIndex
from dataset.splits import Sample, pick
from utils.files import read_json, write_json, write_text


class Selection(NamedTuple):
    """What retraining goes on with.

    Attributes:
        reliable, unreliable: the unlabeled images, best first.
        index: the labeled images that guide each class.
    """

    reliable: list[Sample]
    unreliable: list[Sample]
    index: QueryIndex


def split_by_reliability(scores: Mapping[str, float], keep: float) -> tuple[list[str], list[str]]:
    """Return (reliable, unreliable) image names; higher is more reliable, ties go by name.

    Args:
        scores: by image name.
        keep: share that is reliable, rounded up.
    """
    ranked = sorted(scores, key=lambda name: (-scores[name], name))
    cut = count_kept(len(ranked), keep)
    return ranked[:cut], ranked[cut:]


def count_kept(count: int, keep: float) -> int:
    """Return how many of ``count`` a share keeps, rounded up."""
    return math.ceil(round(count * keep, 9))  # 100 * 0.07 is a little more than 7


def keep_reliable_guides(
    index: QueryIndex, scores: Mapping[tuple[int, str], float], keep: float
) -> QueryIndex:
    """Keep the more reliable share of each class's labeled images, rounded up.

    Args:
        index: class id to image names.
        scores: by (class id, image name), higher is more reliable; what has none comes last.
        keep: the share. Rounding up keeps a class's only guide.
    """
    return {
        label: split_by_reliability(
            {name: scores.get((label, name), -math.inf) for name in names}, keep
        )[0]
        for label, names in index.items()
    }


def write_selection(
    folder: Path,
    images: Mapping[str, float],
    guides: Mapping[tuple[int, str], float],
    index: QueryIndex,
    keep: float,
    classes: Sequence[str],
) -> int:
    """Rank, and write both halves, the kept index (by class name) and all scores.

    Args:
        folder: gets ``reliable.txt``, ``unreliable.txt``, ``query_index.json`` and, as CSV,
            ``unlabeled_scores`` and ``labeled_scores``.
        images: reliability of each unlabeled image.
        guides: reliability of each (class id, labeled image) of the index, and maybe of others.
        index: class id to names of labeled images.
        keep: share that counts as reliable, of the images and of each class's guides.
        classes: names by class id.

    Returns:
        How many images are reliable.
    """
    halves = split_by_reliability(images, keep)
    for name, half in zip(("reliable", "unreliable"), halves, strict=True):
        write_text(folder / f"{name}.txt", "".join(f"{image}\n" for image in half))
    kept = keep_reliable_guides(index, guides, keep)
    write_json(
        folder / "query_index.json", {classes[label]: names for label, names in kept.items()}
    )
    write_csv(folder / "unlabeled_scores.csv", ("image", "reliability"), images.items())
    rows = [(classes[label], name, score) for (label, name), score in guides.items()]
    write_csv(folder / "labeled_scores.csv", ("class", "image", "reliability"), rows)
    return len(halves[0])


def read_selection(folder: Path, unlabeled: Sequence[Sample], classes: Sequence[str]) -> Selection:
    """Read what ``write_selection`` wrote."""
    reliable, unreliable = (
        pick(unlabeled, (folder / f"{name}.txt").read_text(encoding="utf-8").splitlines())
        for name in ("reliable", "unreliable")
    )
    named = read_json(folder / "query_index.json")
    return Selection(
        reliable, unreliable, {classes.index(name): images for name, images in named.items()}
    )


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write a table atomically."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    write_text(path, text.getvalue())
