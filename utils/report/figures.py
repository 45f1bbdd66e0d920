"""The report's plots: SVG whose lines and letters take the colour of the page's text."""

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

_TEXT = "#123456"  # stands for currentColor
_BLUE, _ORANGE, _GREEN, _RED = "#4c8fd6", "#e08a2c", "#48a868", "#d9534f"
COLOURS = (_BLUE, _ORANGE, _GREEN, _RED, "#9a7fd1", "#a58a6a", "#d884b7", "#8a9a3c")
_STYLE = {
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor"), _TEXT),
    **dict.fromkeys(("xtick.color", "ytick.color", "grid.color"), _TEXT),
    "axes.prop_cycle": mpl.cycler(color=COLOURS),
    "axes.grid": True,
    "grid.alpha": 0.15,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.parse_math": False,  # a class may have $ in its name
    "font.size": 11,
    "svg.fonttype": "none",
    "svg.hashsalt": "report",  # the same bytes every time
    "font.family": "sans-serif",
    "legend.frameon": False,
}


@contextmanager
def _drawn(width: float, height: float, count: int = 1) -> Iterator[tuple[list[Any], list[str]]]:
    """Give axes to draw on; the list takes the SVG at the end of the block."""
    written: list[str] = []
    with mpl.rc_context(_STYLE):
        figure = Figure((width, height), layout="constrained")
        axes = figure.subplots(1, count, squeeze=False)[0]
        yield list(axes), written
        content = io.StringIO()
        figure.savefig(content, format="svg", transparent=True, metadata={"Date": None})
    svg = content.getvalue()
    written.append(svg[svg.index("<svg") :].replace(_TEXT, "currentColor"))


def gains(names: Sequence[str], before: Sequence[float], after: Sequence[float]) -> str:
    """Draw how much the IoU of each class rose, in percent; the largest gain on top."""
    rows = [
        (b - a, name) for name, a, b in zip(names, before, after, strict=True) if b - a == b - a
    ]
    rows.sort()
    with _drawn(7, 0.6 + 0.28 * len(rows)) as ((axis,), svg):
        values = [value for value, _ in rows]
        colours = [_GREEN if value >= 0 else _RED for value in values]
        bars = axis.barh([name for _, name in rows], values, color=colours)
        axis.bar_label(bars, [f"{value:+.1f}" for value in values], padding=3)
        axis.axvline(0, color=_TEXT, linewidth=0.8)
        axis.margins(x=0.15)
        axis.set_xlabel("change of IoU, points")
        axis.grid(axis="y", visible=False)
    return svg[0]


def curves(epochs: Sequence[Mapping[str, Any]], stages: Mapping[str, Mapping[str, Any]]) -> str:
    """Draw loss terms, learning rate and mIoU on one axis of iterations over the stages.

    Args:
        epochs: with ``stage``, ``epoch`` and numbers by name.
        stages: with ``iterations``, by name, in order.
    """
    points: dict[str, list[tuple[float, float]]] = {}
    begins, before = [], 0
    for name, report in stages.items():
        own = [epoch for epoch in epochs if epoch["stage"] == name]
        if "iterations" not in report or not own:
            continue
        begins.append((before, name))
        last = max(epoch["epoch"] for epoch in own)
        for epoch in own:
            place = before + epoch["epoch"] / last * report["iterations"]
            for key, value in epoch.items():
                if isinstance(value, int | float) and key != "epoch" and math.isfinite(value):
                    points.setdefault(key, []).append((place, value))
        before += report["iterations"]
    losses = [key for key in ("ce", "consistency", "labeled", "unlabeled") if key in points]
    with _drawn(10, 3.2, 3) as (axes, svg):
        for axis, keys, title in (
            (axes[0], losses, "loss"),
            (axes[1], [key for key in ("lr",) if key in points], "learning rate"),
            (axes[2], [key for key in ("miou",) if key in points], "mIoU of val, %"),
        ):
            factor = 100 if "miou" in keys else 1
            for key in keys:
                places, values = zip(*points[key], strict=True)
                marker = "o" if key == "miou" else "."
                scaled = [factor * value for value in values]
                axis.plot(places, scaled, marker=marker, label=key, linewidth=1.4)
            for place, name in begins:
                axis.axvline(place, color=_TEXT, alpha=0.35, linewidth=0.8, linestyle=":")
                axis.annotate(
                    name[0], (place, 1), xycoords=("data", "axes fraction"), va="top", fontsize=9
                )
            axis.set_title(title, fontsize=11)
            axis.set_xlabel("iteration")
            if len(keys) > 1:
                axis.legend(fontsize=9)
    return svg[0]


def learning(lines: Sequence[Sequence[Any]]) -> str:
    """Draw mIoU with its interval by the number of labeled images, a line a run.

    Args:
        lines: ``Point`` of ``utils.report.learning``.
    """
    with _drawn(7, 3.2) as ((axis,), svg):
        for points in lines:
            values = [point.miou for point in points]
            spans = [(x.miou - x.low, x.high - x.miou) for x in points]
            errors = [[max(0, y) if y == y else 0 for y in z] for z in zip(*spans, strict=True)]
            places = [point.labeled for point in points]
            axis.errorbar(places, values, errors, marker="o", capsize=4, label=points[0].run)
        axis.set_xlabel("labeled images")
        axis.set_ylabel("mIoU of val, %")
        axis.set_xticks(sorted({point.labeled for points in lines for point in points}))
        if len(lines) > 1:
            axis.legend(fontsize=9)
    return svg[0]


def histogram(scores: Sequence[float], kept: int) -> str:
    """Draw image scores, the best first, by whether they are among the ``kept`` reliable ones."""
    with _drawn(7, 2.8) as ((axis,), svg):
        groups = scores[:kept], scores[kept:]
        labels = f"reliable ({kept})", f"unreliable ({len(scores) - kept})"
        axis.hist(groups, bins=30, stacked=True, label=labels, color=(_GREEN, _ORANGE))
        axis.set_xlabel("score of stage 3, higher is more reliable")
        axis.set_ylabel("unlabeled images")
        axis.legend(fontsize=9)
    return svg[0]


def reliability(weights: Mapping[str, Mapping[str, Any]]) -> str:
    """Draw the share of right pixels by the weight that a rule gives them, a line a rule."""
    with _drawn(7, 4) as ((axis,), svg):
        axis.plot([0, 1], [0, 1], color=_TEXT, alpha=0.4, linewidth=1, linestyle="--")
        for name, quality in weights.items():
            groups = [group for group in quality["curve"] if group["share"] >= 0.001]
            places = [group["weight"] for group in groups]
            axis.plot(places, [group["right"] for group in groups], marker=".", label=name)
        axis.set_xlabel("weight (groups with at least 0.1 % of the pixels)")
        axis.set_ylabel("share of right pixels")
        axis.set_xlim(0, 1)
        axis.set_ylim(0, 1)
        axis.legend(fontsize=8)
    return svg[0]
