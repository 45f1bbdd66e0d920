"""Scores of networks on one list, image by image: groups, boundary IoU, intervals, tables."""

import math
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from utils import IGNORE
from utils.errors import UserError

RESAMPLES = 2_000
_LEVEL = (2.5, 97.5)  # percentiles
_BAND = 0.02  # of an image's diagonal
_COMPARED = (
    "dice",
    "boundary_iou",
    "pixel_accuracy",
    "per_class_iou",
    "per_class_dice",
    "by_group",
)  # what a network's difference to the first one is of
NumbersT = TypeVar("NumbersT", np.ndarray, Tensor)


class Scores(NamedTuple):
    """What a network scores on a list of N images with C classes."""

    names: list[str]  # of the images
    confusion: np.ndarray  # (N, C, C) int64 pixels: true class, predicted class
    boundary: np.ndarray  # (N, C, 2) int64 pixels: intersection and union of boundaries

    def per_class(self) -> np.ndarray:
        """IoU: (C,) float64 in [0, 1], NaN for a class that is in no label and no prediction."""
        return _iou(self.overlaps().sum(axis=0))

    def overlaps(self) -> np.ndarray:
        """(N, C, 2) int64 pixels: intersection and union of each class."""
        return _overlaps(self.confusion)


class Groups(NamedTuple):
    """Which images of a list are counted together, such as the slices of a volume."""

    names: list[str]
    of_images: list[int]  # place of each image's group in ``names``


def group_images(images: Sequence[str], pattern: str | None) -> Groups | None:
    """Group images by the part of their name that a regular expression finds; None without one.

    Raises:
        UserError: names an image in whose name nothing is found.
    """
    if pattern is None:
        return None
    found = [re.search(pattern, name) for name in images]
    lacking = [name for name, match in zip(images, found, strict=True) if match is None]
    if lacking:
        more = f" and {len(lacking) - 1} more images" if len(lacking) > 1 else ""
        raise UserError(
            f"dataset.groups: '{pattern}' finds no group in the name of {lacking[0]}{more}; change "
            "it, or set it to null"
        )
    keys = [match[0] for match in found if match is not None]
    places = {key: place for place, key in enumerate(sorted({*keys}))}
    return Groups([*places], [places[key] for key in keys])


def group_of(image: str, pattern: str | None) -> str:
    r"""Return what an image is left out with: its group, or what brackets in the expression find.

    '(patient\d+)_frame\d+' groups the slices of a volume, and leaves out whole patients. An image
    in whose name nothing is found is a group of its own.
    """
    found = re.search(pattern, image) if pattern else None
    return image if found is None else next(filter(None, found.groups()), found[0])


def report_groups(counts: np.ndarray, classes: Sequence[str]) -> dict[str, Any]:
    """Average IoU and Dice of each class over groups of images.

    Args:
        counts: (G, C, C) pixels of each group by true class and predicted class.
        classes: names by class id.

    Returns:
        For JSON: the number of groups; ``per_class_iou`` and ``per_class_dice``, means over the
        groups whose label or prediction shows the class, None where none does; ``iou`` and
        ``dice``, the means of these over classes without the first one, the background.
    """
    iou = _iou(_overlaps(counts))
    means = {"iou": _mean_of_seen(iou), "dice": _mean_of_seen(dice_of(iou))}
    return {
        "groups": len(counts),
        **{key: float(_mean_of_seen(values[1:])) for key, values in means.items()},
        **{f"per_class_{key}": by_class(values, classes) for key, values in means.items()},
    }


def dice_of(iou: NumbersT) -> NumbersT:
    """Return Dice, twice the intersection over the sum of both areas, of IoU; all in [0, 1]."""
    return 2 * iou / (1 + iou)


def mean_and_spread(values: Sequence[float], sign: str = "") -> str:
    """Return mean ± sample standard deviation with one decimal; of one value, the value."""
    around = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.1f}{around}"


class Interval(NamedTuple):
    """A value with the bounds of its 95 % interval."""

    value: float
    low: float
    high: float


def boundary_overlap(prediction: Tensor, label: Tensor, num_classes: int) -> Tensor:
    """Count the intersection and the union of the boundary of each class.

    The boundary of a class is the band of its pixels from which another class is no farther than
    2 % of the image's diagonal, at least 1 pixel, along rows or columns. What is beyond the image
    is another class, and so are ignored pixels, in the prediction too; they count nowhere else.

    Args:
        prediction: (H, W) integer class ids in [0, C).
        label: (H, W) integer class ids; others, 255 among them, are ignored.
        num_classes: C.

    Returns:
        (C, 2) int64 pixels.

    Source: boundary IoU, Cheng et al., CVPR 2021, with masks of classes for those of objects.
    """
    valid = (label >= 0) & (label < num_classes)
    true, found = (torch.where(valid, ids.long(), IGNORE) for ids in (label, prediction))
    distance = max(1, round(_BAND * math.hypot(*label.shape)))
    bands = [valid & ~_interior(ids, distance) for ids in (true, found)]
    areas = [
        torch.bincount(ids[band], minlength=num_classes)
        for ids, band in zip((true, found), bands, strict=True)
    ]
    both = torch.bincount(true[bands[0] & bands[1] & (true == found)], minlength=num_classes)
    return torch.stack([both, areas[0] + areas[1] - both], dim=1)


def _interior(ids: Tensor, distance: int) -> Tensor:
    """Tell where all (H, W) ids within a distance, along rows and columns, are the same."""
    # A square's extremes are those of its rows' extremes.
    maps = F.pad(torch.stack([ids, -ids]).float(), (distance,) * 4, value=float(IGNORE + 1))
    side = 2 * distance + 1
    highest, lowest = F.max_pool2d(F.max_pool2d(maps, (1, side), 1), (side, 1), 1)
    return highest == -lowest


def sequence_of(name: str) -> tuple[str, int] | None:
    """Return the video that an image's name tells, and the number of its frame.

    CamVid's ``0016E5_08159`` and ``0006R0_f00930``, Cityscapes' ``frankfurt_000000_000294_...``.
    None for names that tell none, such as VOC's ``2007_000032`` and COCO's.
    """
    stem = PurePosixPath(name).stem
    camvid = re.fullmatch(r"((?=\w*[A-Za-z])(?=\w*\d)[A-Za-z0-9]+)_f?(\d{4,})", stem)
    cityscapes = re.match(r"([a-z-]+_\d{6})_(\d{6})(_|$)", stem)
    found = camvid or cityscapes
    return (found[1], int(found[2])) if found else None


class Blocks(NamedTuple):
    """Which images are resampled together."""

    following: np.ndarray  # (N, L) int: the images that follow each one in its video, circularly
    lengths: np.ndarray  # (N,) int: how many of these, itself among them, are drawn with it


def blocks_of(names: Sequence[str], groups: Groups | None = None) -> Blocks:
    """Choose images that are drawn together: whole groups, or parts of videos.

    Without groups they are about sqrt(n) frames of a video of n frames; an image whose name tells
    no video is drawn alone.
    """
    videos: dict[Any, list[int]] = {}
    found: list[Any] = [sequence_of(name) for name in names]
    if groups is not None:
        found = [(group, number) for number, group in enumerate(groups.of_images)]

    def length(count: int) -> int:
        return math.ceil(math.sqrt(count)) if groups is None else count

    for index, place in enumerate(found):
        videos.setdefault(index if place is None else place[0], []).append(index)
    longest = max(length(len(frames)) for frames in videos.values())
    following = np.zeros((len(names), longest), int)
    lengths = np.ones(len(names), int)
    for frames in videos.values():
        frames.sort(key=lambda index: (found[index] or ("", 0))[1])
        lengths[frames] = length(len(frames))
        for place, index in enumerate(frames):
            following[index] = np.resize(np.roll(frames, -place), longest)
    return Blocks(following, lengths)


def resample(blocks: Blocks, count: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """Draw images with replacement: (count, N) int, how often each is in each resample of N.

    Blocks begin at random images, such that each image is drawn equally often. Source: circular
    block bootstrap, Politis and Romano (1992), after the moving blocks of Künsch (1989); without
    videos, Efron's bootstrap.
    """
    images, longest = blocks.following.shape
    rng, drawn = np.random.default_rng(seed), np.zeros((count, images), int)
    chance = 1 / blocks.lengths
    for row in drawn:
        starts = rng.choice(images, size=images, p=chance / chance.sum())
        whole = np.arange(longest) < blocks.lengths[starts, None]
        row += np.bincount(blocks.following[starts][whole][:images], minlength=images)
    return drawn


def miou_interval(
    overlaps: np.ndarray, drawn: np.ndarray, less: np.ndarray | None = None
) -> Interval:
    """Return the mean IoU of N images with its interval, or its difference to another network's.

    Args:
        overlaps: (N, C, 2) pixels, intersection and union.
        drawn: (R, N) int from ``resample``: the same for networks that are compared.
        less: overlaps of the network whose mean IoU is taken off.

    Returns:
        In [0, 1], or [-1, 1] for a difference; percentiles 2.5 and 97.5 of the resamples. Classes
        that a resample does not show do not count in it.
    """
    value, spread = _mean(overlaps.sum(axis=0)), _mean(np.tensordot(drawn, overlaps, 1))
    if less is not None:
        value = value - _mean(less.sum(axis=0))
        spread = spread - _mean(np.tensordot(drawn, less, 1))
    return Interval(float(value), *np.nanpercentile(spread, _LEVEL).tolist())


def _overlaps(confusion: np.ndarray) -> np.ndarray:
    """Return intersection and union of each class, (N, C, 2), of N confusion matrices."""
    hits = np.diagonal(confusion, axis1=1, axis2=2)
    return np.stack([hits, confusion.sum(axis=1) + confusion.sum(axis=2) - hits], 2)


def _mean_of_seen(values: np.ndarray) -> np.ndarray:
    """Return means over the first axis of what is not NaN; NaN, without a warning, if all is."""
    seen = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return np.where(seen, values, 0).sum(axis=0) / seen.sum(axis=0)


def _iou(overlaps: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):
        return overlaps[..., 0] / overlaps[..., 1]


def _mean(overlaps: np.ndarray) -> np.ndarray:
    return np.nanmean(_iou(overlaps), axis=-1)


def compare_scores(
    networks: Mapping[str, Scores],
    classes: Sequence[str],
    seed: int = 0,
    groups: Groups | None = None,
) -> dict[str, Any]:
    """Compare networks on the images of one list.

    Args:
        networks: scores by name, of the same images; the others are compared with the first.
        classes: names by class id.
        seed: of the resamples.
        groups: of the images, which are then drawn together; None: there are none.

    Returns:
        For JSON: ``resamples`` in words; and for each network mIoU with its interval, Dice,
        boundary IoU, pixel accuracy, IoU, Dice and boundary IoU by class, the confusion matrix,
        ``report_groups``, and differences to the first; in [0, 1], None for a class that is not
        seen.
    """
    first = next(iter(networks.values()))
    blocks = blocks_of(first.names, groups)
    drawn, reports = resample(blocks, seed=seed), []
    for name, scores in networks.items():
        boundary = _iou(scores.boundary.sum(axis=0))
        counts = scores.confusion.sum(axis=0)
        report = {
            "network": name,
            "miou": miou_interval(scores.overlaps(), drawn)._asdict(),
            "dice": float(np.nanmean(dice_of(scores.per_class()))),
            "boundary_iou": float(np.nanmean(boundary)),
            "pixel_accuracy": float(np.diagonal(counts).sum() / counts.sum()),
            "per_class_iou": by_class(scores.per_class(), classes),
            "per_class_dice": by_class(dice_of(scores.per_class()), classes),
            "per_class_boundary_iou": by_class(boundary, classes),
            "confusion": counts.tolist(),
        }
        if groups is not None:
            of_groups = np.zeros((len(groups.names), *counts.shape), np.int64)
            np.add.at(of_groups, groups.of_images, scores.confusion)
            report["by_group"] = report_groups(of_groups, classes)
        if scores is not first:
            change = miou_interval(scores.overlaps(), drawn, first.overlaps())
            report["difference"] = {
                "miou": change._asdict(),
                **{
                    key: _difference(report[key], reports[0][key])
                    for key in _COMPARED
                    if key in report
                },
            }
        reports.append(report)
    longest, images = int(blocks.lengths.max()), len(first.names)
    unit = "frames of a video" if groups is None else "images of a group"
    how = f" in blocks of up to {longest} {unit}" if longest > 1 else ""
    words = f"95 % interval by {RESAMPLES:,} resamples of {images} images{how}, seed {seed}"
    return {"resamples": words, "networks": reports}


def _difference(one: Any, other: Any) -> Any:
    """Subtract numbers, or those of equal keys; None where one is None."""
    if isinstance(one, dict):
        return {key: _difference(one[key], other[key]) for key in one if key != "groups"}
    return None if one is None or other is None else one - other


def by_class(values: np.ndarray | Tensor, classes: Sequence[str]) -> dict[str, float | None]:
    """Return (C,) numbers by class name, None in place of NaN."""
    numbers = [None if value != value else value for value in values.tolist()]
    return dict(zip(classes, numbers, strict=True))


def lay_out_comparison(comparison: Mapping[str, Any], markdown: bool = False) -> str:
    """Lay out what ``compare_scores`` returns, in percent; in Markdown with confusion matrices."""
    reports = comparison["networks"]
    letters = [
        chr(ord("A") + number) if number < 26 else f"#{number}" for number in range(len(reports))
    ]
    rows = [["", *letters, *(f"{letter} - A" for letter in letters[1:])]]
    changes = [report["difference"] for report in reports[1:]]

    def add(
        title: str, values: Sequence[float | None], differences: Sequence[float | None]
    ) -> None:
        rows.append([title, *map(percent, values), *(percent(x, "+") for x in differences)])

    def pick(key: str, *path: str) -> tuple[list[Any], list[Any]]:
        return [_at(each[key], path) for each in reports], [
            _at(each[key], path) for each in changes
        ]

    add("mIoU", *pick("miou", "value"))
    spans = [[each["miou"] for each in group] for group in (reports, changes)]
    rows.append(["95 % interval", *map(_span, spans[0]), *(_span(x, "+") for x in spans[1])])
    add("Dice", *pick("dice"))
    if "by_group" in reports[0]:
        add("Dice by group", *pick("by_group", "dice"))
    add("boundary IoU", *pick("boundary_iou"))
    add("pixel accuracy", *pick("pixel_accuracy"))
    for name in reports[0]["per_class_iou"]:
        add(name, *pick("per_class_iou", name))
    for name in reports[0].get("by_group", {}).get("per_class_dice", ()):
        add(f"{name}, Dice by group", *pick("by_group", "per_class_dice", name))
    named = [f"{letter}  {each['network']}" for letter, each in zip(letters, reports, strict=True)]
    means = [describe_mean(each["per_class_iou"]) for each in reports]
    few = [f"{letter}: mIoU {x}" for letter, x in zip(letters, means, strict=True) if x]
    notes = "\n".join([comparison["resamples"], *few])
    if not markdown:
        return "\n".join([*named, "", align(rows), "", notes])
    parts = ["\n".join(f"- {line}" for line in named), as_markdown(rows), notes]
    for letter, report in zip(letters, reports, strict=True):
        parts.append(f"Confusion matrix of {letter}, % of the pixels of each true class:")
        parts.append(as_markdown(confusion_rows(report["confusion"], [*report["per_class_iou"]])))
    return "\n\n".join(parts)


def confusion_rows(counts: Sequence[Sequence[int]], classes: Sequence[str]) -> list[list[str]]:
    """Return a table of the share of each true class's pixels by predicted class, in percent."""
    rows = [["true \\ predicted", *classes]]
    for name, row in zip(classes, counts, strict=True):
        total = sum(row)
        rows.append([name, *(f"{100 * count / total:.1f}" if total else "" for count in row)])
    return rows


def as_markdown(rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table whose first row is its head; numbers stand on the right."""
    head, *others = ([cell.replace("|", "\\|") for cell in row] for row in rows)
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *others]
    return "\n".join(f"| {' | '.join(row)} |" for row in lines)


def align(rows: Sequence[Sequence[str]]) -> str:
    """Lay out a table as text: its first column on the left, the others on the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        f"{row[0]:<{widths[0]}}"
        + "".join(f"  {cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))
        for row in rows
    )


def _at(value: Any, path: Sequence[str]) -> Any:
    for key in path:
        value = value[key]
    return value


def percent(value: float | None, sign: str = "") -> str:
    """Write a share in percent with two decimals; 'not seen' for None and NaN."""
    return "not seen" if value is None or value != value else f"{100 * value:{sign}.2f}"


def _span(interval: Mapping[str, float], sign: str = "") -> str:
    return " to ".join(f"{100 * interval[end]:{sign}.1f}" for end in ("low", "high"))


def describe_mean(per_class_iou: Mapping[str, float | None]) -> str | None:
    """Say over which classes a mean IoU is where it is not over all; None where it is."""
    seen = [name for name, iou in per_class_iou.items() if iou is not None]
    if len(seen) == len(per_class_iou):
        return None
    shown = f" ('{seen[0]}')" if len(seen) == 1 else ""
    count = f"over {len(seen)} of {len(per_class_iou)} classes{shown}"
    return f"{count}; others are neither labeled nor predicted"
