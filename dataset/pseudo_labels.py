"""The pseudo labels that a run leaves in its folder."""

from pathlib import Path, PurePosixPath
from typing import NamedTuple

from dataset.catalog import DatasetInfo, dataset_info
from dataset.lists import Sample, find_root, mask_file
from utils.config.schema import Config
from utils.errors import UserError
from utils.run.folder import number_in, read_kept, read_table, stage_again

STAGES = ("2_pseudo_label", "5_relabel")  # the later one counts where it has an image


class PseudoLabels(NamedTuple):
    """What a run predicts of unlabeled images."""

    config: Config  # of the run
    kind: DatasetInfo
    root: Path  # of the data
    samples: list[Sample]  # by name, with their masks: class ids, 255 where they are doubtful
    confidence: dict[str, float]  # by name: mean probability of the pixels' classes


def read_pseudo_labels(run: Path) -> PseudoLabels:
    """Find the last pseudo labels of a run.

    Raises:
        UserError: no run, no data, or no pseudo labels; a damaged table.
    """
    config = read_kept(run)
    kind, root = dataset_info(config.dataset), find_root(config.dataset)
    samples, confidence = dict[str, Sample](), dict[str, float]()
    for table in (run / stage / "confidence.csv" for stage in STAGES):
        if not table.is_file():  # a stage that has not ended
            continue
        again = stage_again(table.parent.name)
        for name, cell in read_table(table, ("image", "confidence"), again)[1]:
            if {"..", "/"} & {*PurePosixPath(name).parts}:
                raise UserError(f"{table}: {name} leaves the data root; {again}")
            confidence[name] = number_in(cell, table, again, low=0)
            sample = Sample(name, root / name, None, pixels=kind.pixels)
            samples[name] = sample._replace(mask=mask_file(table.parent / "masks", sample))
    if not samples:
        raise UserError(f"{run}: has no pseudo labels; stage 2 of a run writes them")
    return PseudoLabels(config, kind, root, sorted(samples.values()), confidence)
