"""The pseudo labels that a run leaves in its folder."""

from csv import DictReader
from pathlib import Path
from typing import NamedTuple

from dataset.catalog import DatasetInfo, dataset_info
from dataset.lists import Sample, find_root, mask_file
from utils.config.schema import Config
from utils.errors import UserError
from utils.run.folder import read_kept

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
        UserError: no run, no data, or no pseudo labels.
    """
    config = read_kept(run)
    kind, root = dataset_info(config.dataset), find_root(config.dataset)
    samples, confidence = dict[str, Sample](), dict[str, float]()
    for table in (run / stage / "confidence.csv" for stage in STAGES):
        if not table.is_file():  # a stage that has not ended
            continue
        with table.open(encoding="utf-8", newline="") as file:
            found = {row["image"]: float(row["confidence"]) for row in DictReader(file)}
        confidence |= found
        for name in found:
            sample = Sample(name, root / name, None, pixels=kind.pixels)
            samples[name] = sample._replace(mask=mask_file(table.parent / "masks", sample))
    if not samples:
        raise UserError(f"{run}: has no pseudo labels; stage 2 of a run writes them")
    return PseudoLabels(config, kind, root, sorted(samples.values()), confidence)
