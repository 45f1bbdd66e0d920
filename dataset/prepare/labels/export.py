"""Pseudo labels of a run, for correction in a labeling tool."""

import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from dataset.lists import read_list
from dataset.prepare.labels.records import BACKGROUND, OPEN
from dataset.prepare.work import require
from dataset.pseudo_labels import PseudoLabels
from dataset.reading import read_ids
from utils import IGNORE
from utils.errors import UserError
from utils.files import write_text, writing

Writer = Callable[[PseudoLabels, Path], None]


def choose(labels: PseudoLabels, path: Path) -> PseudoLabels:
    """Return the pseudo labels of the images in a list; a ``UserError`` if one has none."""
    by_name, chosen = {sample.name: sample for sample in labels.samples}, []
    for sample in read_list(path, labels.root, labels.kind):
        if sample.name not in by_name:
            raise UserError(f"{path}: {sample.name} has no pseudo label in this run; take it off")
        chosen.append(by_name[sample.name])
    return labels._replace(samples=chosen)


def refuse_other_threshold(labels: PseudoLabels, threshold: float, run: Path) -> None:
    """Raise a ``UserError`` if a run's pseudo labels were stored by another threshold."""
    stored = labels.config.pseudo_label.threshold
    if threshold != stored:
        raise UserError(
            f"--threshold: the masks of {run} were stored by pseudo_label.threshold={stored:g}, "
            "without probabilities; leave --threshold out, or do stage 2 and later ones again: "
            f"python train.py --config {shlex.quote(str(run / 'config.yaml'))} --from-stage 2 "
            f"pseudo_label.threshold={threshold:g}"
        )


def rest_of(labels: PseudoLabels) -> int | None:
    """Return the class of pixels that no tool draws, if there is one."""
    classes = labels.kind.classes
    return classes.index(BACKGROUND) if BACKGROUND in classes else None


def label_of(labels: PseudoLabels, id_: int) -> str:
    """Return a tool's label of a class id; 255, a doubtful region, is left open."""
    return OPEN if id_ == IGNORE else labels.kind.classes[id_]


def export_labels(labels: PseudoLabels, tool: str, write: Writer, out: Path) -> list[str]:
    """Write pseudo labels for a tool; return what to do next, in lines.

    Raises:
        UserError: ``out`` is there; a pseudo label cannot be read.
    """
    if out.exists():
        raise UserError(f"{out}: is there already; move it away, or name another place with --out")
    partial_out = out.with_name(f".{out.name}.partial")  # whole or absent, as a file is
    shutil.rmtree(partial_out, ignore_errors=True)
    write(labels, partial_out)
    write_text(partial_out / "classes.txt", "".join(f"{x}\n" for x in labels.kind.classes))
    with writing(out):
        partial_out.rename(out)
    ids = [read_ids(sample.mask) for sample in labels.samples]
    share = sum(np.count_nonzero(x == IGNORE) for x in ids) / sum(x.size for x in ids)
    options = {
        "--from": tool,
        "--images": labels.root,
        "--root": labels.root,
        "--lists": labels.root / "corrected",
        "--classes": out / "classes.txt",
    }
    words = [out, *(word for pair in options.items() for word in pair)]
    threshold = labels.config.pseudo_label.threshold
    return [
        f"{out}: {len(labels.samples)} images; {share:.1%} of the pixels, whose probability is "
        f"below pseudo_label.threshold={threshold:g}, are left open as '{OPEN}'",
        "after correction:",
        f"  python -m dataset.prepare labels {shlex.join(map(str, words))}",
    ]


def regions_of(ids: np.ndarray) -> Iterator[tuple[int, tuple[slice, slice], np.ndarray]]:
    """Return the connected regions of equal ids, larger boxes first.

    Args:
        ids: (H, W) uint8.

    Returns:
        The id of each region, its box, and its pixels in the box, bool. Pixels are connected by
        their sides.
    """
    require("skimage", "scikit-image")
    from skimage import measure  # no other command needs it

    numbers = measure.label(ids.astype(np.int32), background=-1, connectivity=1)
    found = measure.regionprops(numbers)
    for region in sorted(found, key=lambda region: -region.area_bbox):
        row, column = region.coords[0]
        yield int(ids[row, column]), region.slice, region.image
