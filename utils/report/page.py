"""The report's page: what each section says of a run, and its pictures."""

import base64
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader
from PIL import Image

from utils import IGNORE
from utils.panels import encode, in_colour, mark_places
from utils.report import figures
from utils.report.learning import learning_curve
from utils.report.reading import (
    PredictedImage,
    Predictions,
    RunFolder,
    by_method,
    read_mask,
    read_picture,
)
from utils.run.results import describe_stop
from utils.scores import confusion_rows, describe_mean, mean_and_spread

_SHOWN, _FALLEN = 12, 6  # best and worst images; images that fell most
_SIDE = 200  # pixels of a picture, the longer side
_TABLE = 40  # classes of a confusion matrix that is a table
_DIAGNOSE = (
    "Not known: python eval.py {run} --diagnose LIST compares pseudo labels with true masks of "
    "unlabeled images, where there are any; then make this page again."
)


def page(runs: Sequence[RunFolder]) -> str:
    """Return the report of one or several runs as HTML; everything it shows is in it."""
    place = FileSystemLoader(Path(__file__).parent)
    template = Environment(loader=place, autoescape=True, trim_blocks=True).get_template(
        "page.html"
    )
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    return template.render(
        title=title,
        comparison=_comparison(runs) if len(runs) > 1 else None,
        learning=learning_curve(runs),
        runs=[_run(run) for run in runs],
    )


def _comparison(runs: Sequence[RunFolder]) -> dict[str, Any]:
    """Compare groups of runs that differ in their seeds: mIoU of the last training stage."""
    groups = by_method(runs)
    last = {
        name: {run.config.seed: list(run.mious.values())[-1] for run in members}
        for name, members in groups.items()
    }
    means = {name: float(np.mean([*seeds.values()])) for name, seeds in last.items()}
    supervised = [name for name, members in groups.items() if members[0].config.stages == [1]]
    best = max(supervised, key=means.__getitem__, default=None)
    rows = []
    for name, seeds in last.items():
        paired = [seeds[s] - last[best][s] for s in seeds if s in last[best]] if best else []
        against = mean_and_spread(paired, "+") if paired and name != best else ""
        numbers = ", ".join(map(str, sorted(seeds)))
        first = [next(iter(run.mious.values())) for run in groups[name]]
        rows.append(
            [name, numbers, mean_and_spread(first), mean_and_spread([*seeds.values()]), against]
        )
    names = sorted(means, key=means.__getitem__, reverse=True)
    if best is None:
        told = (
            f"The highest mean is {means[names[0]]:.1f}, of {names[0]}; no run is supervised alone."
        )
    else:
        other = [name for name in names if name not in supervised]
        gain = means[other[0]] - means[best] if other else 0.0
        told = f"The best supervised runs are those of {best}: {means[best]:.1f} mIoU."
        if other:
            helped = "Unlabeled images helped" if gain > 0 else "Unlabeled images did not help"
            told += f" {helped}: {other[0]} has {means[other[0]]:.1f}, {gain:+.1f} points."
    stops = [
        f"{run.name}, {stage} {stop}"
        for run in runs
        for stage, report in run.stages.items()
        if (stop := describe_stop(report))
    ]
    told += "".join(f" {stop}." for stop in stops)
    head = ["runs", "seeds", "stage 1", "last stage", f"against {best}" if best else ""]
    return {"told": told, "rows": [head, *rows]}


def _run(run: RunFolder) -> dict[str, Any]:
    """Return what the template shows of a run, by section."""
    reports = run.predictions
    return {
        "name": run.name,
        "folder": str(run.folder),
        "gain": _gain(run),
        "classes": _classes(reports),
        "fallen": _find_fallen(reports),
        "rectification": _rectification(run),
        "curves": figures.curves(run.epochs, run.stages) if run.epochs else "",
        "confusion": _confusion(reports[-1]) if reports else None,
        "extremes": _extremes(reports[-1]) if reports else None,
        "stages": _stage_rows(run),
        "settings": run.settings,
        "environment": [[key, str(value)] for key, value in run.environment.items()],
    }


def _gain(run: RunFolder) -> str:
    (first, before), *_, (last, after) = [*run.mious.items(), *run.mious.items()]
    few = describe_mean(run.stages[last].get("per_class_iou", {}))
    note = f" mIoU {few}." if few else ""
    if first == last:
        return f"Only supervised training has ended: {before:.1f} mIoU after {first}.{note}"
    helped = "Yes" if after > before else "No"
    return (
        f"{helped}: mIoU went from {before:.1f} after {first} to {after:.1f} after {last}, "
        f"{after - before:+.1f} points. Longer supervised training gains too: compare with runs of "
        f"--method supervised (python -m utils.study), and with other seeds.{note}"
    )


def _classes(reports: Sequence[Predictions]) -> dict[str, Any]:
    if len(reports) < 2:
        return {"told": "Not known: this needs the predictions of two stages in val/.", "plot": ""}
    first, last = (100 * each.iou for each in (reports[0], reports[-1]))
    names = reports[0].classes
    change = {name: gain for name, gain in zip(names, last - first, strict=True) if gain == gain}
    rose = sorted((name for name in change if change[name] > 0), key=lambda name: -change[name])
    fell = sorted((name for name in change if change[name] < 0), key=lambda name: change[name])
    words = [f"{len(rose)} of {len(change)} classes rose"]
    words += [f"most {rose[0]} ({change[rose[0]]:+.1f})"] if rose else []
    words += (
        [f"{len(fell)} fell, most {fell[0]} ({change[fell[0]]:+.1f})"] if fell else ["none fell"]
    )
    shown = [["class", "stage 1", "last stage", "change"]]
    for name, one, other in zip(names, first, last, strict=True):
        shown.append([name, *(_number(value) for value in (one, other)), _number(other - one, "+")])
    return {
        "told": f"{'; '.join(words)}.",
        "plot": figures.gains(names, first, last),
        "rows": shown,
    }


def _find_fallen(reports: Sequence[Predictions]) -> dict[str, Any]:
    if len(reports) < 2:
        return {
            "told": "Not known: this needs the predictions of two stages in val/.",
            "images": [],
        }
    before = {image.name: image for image in reports[0].images}
    pairs = [(image.miou - before[image.name].miou, image) for image in reports[-1].images]
    pairs = sorted((p for p in pairs if p[0] == p[0]), key=lambda pair: pair[0])
    fell = [(change, image) for change, image in pairs if change < 0]
    told = f"{len(fell)} of {len(pairs)} validation images have a lower mIoU than after stage 1."
    shown = [
        _figure(
            f"{image.name}: {_change(before[image.name], image)}",
            image,
            {"stage 1": before[image.name].mask, "last stage": image.mask},
        )
        for _, image in fell[:_FALLEN]
    ]
    return {"told": told, "images": shown, "legend": _legend(reports[-1])}


def _change(before: PredictedImage, after: PredictedImage) -> str:
    return f"{100 * before.miou:.0f} → {100 * after.miou:.0f}"


def _rectification(run: RunFolder) -> dict[str, Any]:
    scores, kept = run.selection
    known = [score for score in scores if math.isfinite(score)]
    found = run.diagnosis
    panels = [
        {
            "caption": f"{name}, {file.stem.replace('_', ' ')}",
            "source": _picture(read_picture(file), 1240),
        }
        for name, file in run.panels.items()
    ]
    weights = {} if found is None else found["weights"]
    shown = {name: weights[name] for name in weights if weights[name]["curve"]}
    return {
        "told": [_DIAGNOSE.format(run=run.folder)]
        if found is None
        else explain_diagnosis(run.config, found),
        "panels": panels,
        "labels": _label_rows(found),
        "weights": _weight_rows(weights),
        "reliability": figures.reliability(shown) if shown else "",
        "histogram": figures.histogram(known, min(kept, len(known))) if known else "",
        "unknown": _without_score(len(scores) - len(known), len(scores)),
        "correlation": _correlation(found or {}),
    }


def _without_score(count: int, total: int) -> str:
    if not count:
        return ""
    return (
        f"{count} of {total} unlabeled images have no score: no class of their pseudo labels "
        "counts. They rank last."
    )


def explain_diagnosis(config: Any, found: Mapping[str, Any]) -> list[str]:
    """Say what pseudo labels were corrected and weighed down, and whether that was right.

    Args:
        config: of the run.
        found: what ``eval.py --diagnose`` keeps.
    """
    classes, told = found["classes"], []
    if classes.keys() >= {"teacher", "votes", "both"}:
        mious = [_percent(classes[name]["miou"]) for name in ("teacher", "votes", "both")]
        told.append(
            "Votes of labeled patches correct the teacher's labels: the teacher's most probable "
            f"classes have {mious[0]} mIoU on the unlabeled images, those of the votes "
            f"{mious[1]}, and those of both {mious[2]}."
        )
    sure = "probability by both" if "both" in classes else "confidence"
    limit = config.pseudo_label.threshold
    if limit and sure in found["weights"]:
        low, high = _parts(found["weights"][sure]["curve"], limit)
        told.append(
            f"{_verdict(low, high)} Of the teacher's classes whose {sure} is below {limit:g} "
            f"({100 * low[0]:.0f} % of the pixels, ignored by 'pseudo_label.threshold' or labeled "
            f"otherwise), {100 * low[1]:.0f} % are right; of the others {100 * high[1]:.0f} %."
        )
    rule = config.retrain.weight
    quality = found["weights"].get(rule)
    if quality is not None and quality["auroc"] is not None:
        means = _mean_weights(quality["curve"])
        told.append(
            f"The weight of this run, '{rule}', is {means[1]:.2f} on right pixels and "
            f"{means[0]:.2f} on wrong ones: a right pixel weighs more than a wrong one in "
            f"{100 * quality['auroc']:.0f} % of pairs (50 % is chance)."
        )
    elif rule == "ones":
        told.append("All pixels that are not ignored weigh the same ('retrain.weight: ones').")
    return told


def _verdict(low: tuple[float, float], high: tuple[float, float]) -> str:
    if not low[0]:
        return "Nothing was left out."
    return (
        "What was left out is mostly wrong."
        if low[1] < 0.5
        else (
            "What was left out is wrong more often than the rest, but mostly right."
            if low[1] < high[1]
            else "What was left out is no worse than the rest."
        )
    )


def _parts(curve: Sequence[Mapping[str, float]], limit: float) -> list[tuple[float, float]]:
    """Return share of the pixels and share of right ones, below a weight and from it on."""
    parts = []
    for low in (True, False):
        groups = [group for group in curve if (group["weight"] < limit) == low]
        share = sum(group["share"] for group in groups)
        right = sum(group["share"] * group["right"] for group in groups)
        parts.append((share, right / share if share else 0.0))
    return parts


def _mean_weights(curve: Sequence[Mapping[str, float]]) -> tuple[float, float]:
    """Return the mean weight of wrong and of right pixels."""
    means = []
    for right in (False, True):
        areas = [x["share"] * (x["right"] if right else 1 - x["right"]) for x in curve]
        total = sum(areas)
        weighed = sum(area * x["weight"] for area, x in zip(areas, curve, strict=True))
        means.append(weighed / total if total else math.nan)
    return means[0], means[1]


def _label_rows(found: Mapping[str, Any] | None) -> list[list[str]]:
    if found is None:
        return []
    rows = [["stored labels of", "images", "labeled pixels", "mIoU", "right pixels"]]
    for stage, report in found["labels"].items():
        shares = [_percent(report[key]) for key in ("share", "miou", "pixel_accuracy")]
        rows.append([stage, str(report["images"]), *shares])
    return rows


def _weight_rows(weights: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    rows = [["weight", "AUROC", "calibration error", "weight on wrong pixels"]]
    for name, quality in weights.items():
        keys = ("auroc", "calibration_error", "weight_on_wrong")
        cells = ("-" if quality[key] is None else f"{quality[key]:.3f}" for key in keys)
        rows.append([name, *cells])
    return rows if len(rows) > 1 else []


def _correlation(found: Mapping[str, Any]) -> str:
    if "rank_correlation" not in found:
        return ""
    value = found["rank_correlation"]
    shown = "undefined" if value is None else f"{value:.2f}"
    return f"Rank correlation of the scores with the true mIoU of the pseudo labels: {shown}."


def _confusion(predictions: Predictions) -> dict[str, Any] | None:
    classes, counts = predictions.classes, predictions.confusion
    if len(classes) > _TABLE:
        return {"told": f"{len(classes)} classes are too many for a table; see val/.", "rows": []}
    total = counts.sum(axis=1, keepdims=True)
    shares = counts / np.maximum(total, 1)
    wrong = shares * (1 - np.eye(len(classes)))
    true, other = np.unravel_index(wrong.argmax(), wrong.shape)
    told = (
        f"Most often confused: {100 * wrong[true, other]:.0f} % of {classes[true]} is taken for "
        f"{classes[other]}. Rows are true classes, in % of their pixels."
    )
    cells = confusion_rows(counts.tolist(), classes)
    alphas = [[f"{share:.3f}" for share in row] for row in shares.tolist()]
    rows = [
        list(zip(row[1:], alpha, strict=True)) for row, alpha in zip(cells[1:], alphas, strict=True)
    ]
    return {"told": told, "head": cells[0], "rows": list(zip(classes, rows, strict=True))}


def _extremes(predictions: Predictions) -> dict[str, Any]:
    """Show the best and the worst images of a stage, each image in one of the two at most."""
    ranked = sorted((x for x in predictions.images if x.miou == x.miou), key=lambda x: x.miou)
    count = min(_SHOWN, len(ranked) // 2)
    groups = {"best": ranked[::-1][:count], "worst": ranked[:count]}
    shown = {
        title: [
            _figure(f"{x.name}: {100 * x.miou:.0f}", x, {"prediction": x.mask}, errors=True)
            for x in images
        ]
        for title, images in groups.items()
    }
    return {**shown, "legend": _legend(predictions), "count": count}


def _figure(
    caption: str, image: PredictedImage, masks: Mapping[str, Path], errors: bool = False
) -> dict[str, Any]:
    """Show an image: itself, its label, masks, errors; the caption says where there is no file."""
    files = (image.picture, image.label, *masks.values())
    if image.picture is None or not all(path.is_file() for path in files):
        why = "is not in dataset.root" if image.picture is None else "or a mask of it is gone"
        return {"caption": f"{caption} (not shown: the picture {why})", "pictures": []}
    true, palette = read_mask(image.label)
    size = true.shape[::-1]
    photograph = read_picture(image.picture).convert("RGB").resize(size)
    views = [("image", photograph), ("true", in_colour(true, palette))]
    for title, path in masks.items():
        found, palette = read_mask(path, size)
        views.append((title, in_colour(found, palette)))
    if errors:
        views.append(("wrong in red", mark_places(photograph, (found != true) & (true != IGNORE))))
    shown = [{"title": title, "source": _picture(view)} for title, view in views]
    return {"caption": caption, "pictures": shown}


def _picture(picture: Image.Image, side: int = _SIDE) -> str:
    """Return a picture as a data URI: masks exactly, photographs as WebP."""
    if picture.mode == "P":
        scale = min(1.0, side / max(picture.size))
        size = [max(1, round(scale * length)) for length in picture.size]
        content = encode(picture.resize(size, Image.Resampling.NEAREST), optimize=True)
        return f"data:image/png;base64,{base64.b64encode(content).decode()}"
    picture = picture.convert("RGB")
    picture.thumbnail((side, side))
    content = encode(picture, "WEBP", quality=80)
    return f"data:image/webp;base64,{base64.b64encode(content).decode()}"


def _legend(predictions: Predictions) -> list[tuple[str, str]]:
    """Return class names and colours, which the masks' palette has."""
    for image in predictions.images:
        if image.label.is_file():
            _, palette = read_mask(image.label)
            colours = [palette[3 * number :][:3] for number in range(len(predictions.classes))]
            named = (f"rgb({red}, {green}, {blue})" for red, green, blue in colours)
            return list(zip(predictions.classes, named, strict=True))
    return []


def _stage_rows(run: RunFolder) -> list[list[str]]:
    rows = [["stage", "mIoU", "iterations", "labeled crops", "unlabeled", "images", "time"]]
    for name, report in run.stages.items():
        keys = ("iterations", "labeled_crops", "unlabeled_crops", "images")
        minutes, seconds = divmod(round(report.get("seconds", 0)), 60)
        miou = _number(100 * report["miou"]) if report.get("miou") is not None else ""
        shown = {**report, "iterations": describe_stop(report) or report.get("iterations", "")}
        cells = (str(shown.get(key, "")) for key in keys)
        rows.append([name, miou, *cells, f"{minutes}:{seconds:02d}"])
    return rows


def _number(value: float, sign: str = "") -> str:
    return "not seen" if value != value else f"{value:{sign}.1f}"


def _percent(share: float | None) -> str:
    return "not seen" if share is None else f"{100 * share:.1f}"
