"""Pseudo labels of a run, for correction in a labeling tool."""

from collections.abc import Callable, Iterator
from csv import DictReader
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dataset.catalog import Kind, describe
from dataset.lists import Sample, find_root, mask_file, read_list
from dataset.prepare.labels.records import BACKGROUND, OPEN
from dataset.prepare.work import require
from dataset.reading import read_ids
from utils import IGNORE
from utils.config.reading import read_config
from utils.errors import UserError

STAGES = ("2_pseudo_label", "5_relabel")  # the later one counts where it has an image


class PseudoLabels(NamedTuple):
    """What a run predicts of unlabeled images."""

    kind: Kind
    root: Path  # of the data
    samples: list[Sample]  # with their pseudo labels: class ids, 255 where they are doubtful

    def label_of(self, id_: int) -> str:
        """Return a tool's label of a class id; 255, a doubtful region, is left open."""
        return OPEN if id_ == IGNORE else self.kind.classes[id_]

    @property
    def rest(self) -> int | None:
        """The class of pixels that no tool draws, if there is one."""
        return self.kind.classes.index(BACKGROUND) if BACKGROUND in self.kind.classes else None


Writer = Callable[[PseudoLabels, Path], None]


def read_pseudo_labels(run: Path, chosen: Path | None = None) -> PseudoLabels:
    """Find the last pseudo labels of a run.

    Args:
        run: its folder.
        chosen: list of the images that are wanted; None: all.

    Raises:
        UserError: no run, no data, no pseudo labels; a chosen image has none.
    """
    if not (run / "config.yaml").is_file():
        raise UserError(f"{run}: is no run folder (it has no config.yaml); name outdir/<name>")
    section = read_config(str(run / "config.yaml")).dataset
    kind, root, masks = describe(section), find_root(section), dict[str, Path]()
    for table in (run / stage / "confidence.csv" for stage in STAGES):
        if table.is_file():  # else the stage has not ended
            with table.open(encoding="utf-8", newline="") as file:
                names = [row["image"] for row in DictReader(file)]
            masks |= dict.fromkeys(names, table.parent / "masks")
    if not masks:
        raise UserError(f"{run}: has no pseudo labels; stage 2 of a run writes them")
    names = list(masks)
    if chosen is not None:
        names = [sample.name for sample in read_list(chosen, root, kind)]
        for name in names:
            if name not in masks:
                raise UserError(f"{chosen}: {name} has no pseudo label in {run}; take it off")
    samples = [Sample(name, root / name, None) for name in sorted(names)]
    return PseudoLabels(kind, root, [x._replace(mask=mask_file(masks[x.name], x)) for x in samples])


def export_labels(labels: PseudoLabels, tool: str, write: Writer, out: Path) -> list[str]:
    """Write pseudo labels for a tool; return what to do next, in lines.

    Raises:
        UserError: ``out`` is there; a pseudo label cannot be read.
    """
    if out.exists():
        raise UserError(f"{out}: is there already; move it away, or name another place with --out")
    write(labels, out)
    ids = [read_ids(sample.mask) for sample in labels.samples]
    share = sum(np.count_nonzero(x == IGNORE) for x in ids) / sum(x.size for x in ids)
    return [
        f"{out}: {len(labels.samples)} images; {share:.1%} of the pixels are doubtful, left open "
        f"as '{OPEN}'",
        "after correction:",
        f"  python -m dataset.prepare labels --from {tool} {out} --images {labels.root} "
        f"--root {labels.root} --lists {labels.root / 'corrected'} "
        f"--classes '{','.join(labels.kind.classes)}'",
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
