"""Pictures of what a method makes of unlabeled images, drawn while a student learns.

``Panels`` draws rows of two kinds. Where labels were corrected by votes (``cisc_patch``): the
whole image, the teacher's label, the votes' label, what both make together, and the labeled images
that voted most; stage 2 or 5 kept these with ``keep_votes``. Else: the crop, label and weight of
this epoch's training sample; where retraining queries, its very partner and the CISC map.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import default_collate

from dataset.catalog import dataset_info
from dataset.lists import Sample, mask_file, read_label, read_picture
from dataset.loader import SampleKey
from dataset.query import Partner
from dataset.reading import read_ids, to_input
from dataset.training import RetrainSample, RetrainSamples
from model.cisc.pseudo_labels import Opinions, PseudoLabeler
from model.cisc.students import Labeler
from utils import IGNORE
from utils.distributed import on_rank_zero
from utils.evaluation import Predictor, base_size
from utils.files import read_json, write_json
from utils.panels import (
    Picture,
    as_picture,
    in_colour,
    in_grey,
    mark_places,
    overlay,
    panel,
    save,
    save_mask,
)
from utils.run.stages import Stage

SHOWN_VOTERS = 2  # labeled images that voted most
_HEIGHT, _WIDTH, _TEXT = 170, 170, 14  # pixels: a picture at most; letters


class Evidence(NamedTuple):
    """What a labeling stage keeps of an image for the panels."""

    teacher: np.ndarray  # (H, W) uint8, the teacher's most probable classes
    votes: np.ndarray  # (H, W) uint8, those of the votes
    voters: list[tuple[str, float]]  # names of labeled images, and their shares of the votes


def shown_samples(samples: Sequence[Sample], count: int) -> list[Sample]:
    """Return so many samples, evenly spaced; all if there are not more."""
    count = min(count, len(samples))
    return [samples[number * len(samples) // count] for number in range(count)]


def keep_opinions(
    folder: Path, sample: Sample, image: Tensor, opinions: Opinions, labeler: PseudoLabeler
) -> None:
    """Keep what the panels show of an image, (1, 3, h, w), of which (1, C, H, W) opinions are."""
    voters = [(one.name, share) for one, share in labeler.voter.voters_of(image, SHOWN_VOTERS)]
    maps = (_ids(maps[0].argmax(dim=0)) for maps in (opinions.teacher, opinions.votes))
    palette = dataset_info(labeler.config.dataset).palette()
    keep_votes(folder, sample, Evidence(*maps, voters), palette)


def keep_votes(folder: Path, sample: Sample, evidence: Evidence, palette: bytes) -> None:
    """Keep what the panels show of an image in the folder of a labeling stage."""
    for part in ("teacher", "votes"):
        save_mask(_kept_file(folder, part, sample), getattr(evidence, part), palette)
    write_json(_kept_file(folder, "voters", sample).with_suffix(".json"), evidence.voters)


def read_votes(folders: Sequence[Path], sample: Sample) -> Evidence | None:
    """Read what the last of some labeling stages kept of an image; None if none did."""
    for folder in reversed(folders):
        file = _kept_file(folder, "voters", sample).with_suffix(".json")
        if file.is_file():
            maps = (read_ids(_kept_file(folder, part, sample)) for part in ("teacher", "votes"))
            return Evidence(*maps, [(name, share) for name, share in read_json(file)])
    return None


def _kept_file(folder: Path, part: str, sample: Sample) -> Path:
    return mask_file(folder / "panels" / part, sample)


class Panels:
    """Draws the same unlabeled images as a retraining stage goes on; changes no result.

    Args:
        stage: gets ``panels/epoch_007.png`` and so on, and shows them where it logs.
        samples: of the stage; ``shown`` ones are drawn.
        shown: unlabeled images; those that the stage does not train on are left out.
        labeler: labels and weighs as training does.
        labeled_by: folders of the labeling stages that corrected labels by votes; may be empty.
        truth: true masks by image name, to mark wrong pseudo labels.
    """

    def __init__(
        self,
        stage: Stage,
        samples: RetrainSamples,
        shown: Sequence[Sample],
        labeler: Labeler,
        labeled_by: Sequence[Path],
        truth: Mapping[str, Sample],
    ) -> None:
        self._stage, self._samples, self._labeler = stage, samples, labeler
        self._labeled_by, self._truth = labeled_by, truth
        self._info = dataset_info(stage.config.dataset)
        self._labeled = {sample.name: sample for sample in samples.labeled}
        numbers = {sample.name: number for number, sample in enumerate(samples.unlabeled)}
        self._numbers = [numbers[sample.name] for sample in shown if sample.name in numbers]

    @on_rank_zero
    @torch.no_grad()
    def draw(self, net: nn.Module, epoch: int, iteration: int) -> None:
        """Draw the images with a network's predictions after so many epochs and iterations."""
        stage = self._stage
        if not self._numbers:
            return
        predict = Predictor(net.eval(), stage.device, stage.config.inference)
        row_of = self._row_of_votes if self._labeled_by else self._row_of_training
        rows = [row_of(number, predict, epoch) for number in self._numbers]
        titles = list(dict.fromkeys(title for row in rows for title in row))
        if not any(self._samples.unlabeled[number].name in self._truth for number in self._numbers):
            titles.remove("wrong in it (red)")
        blank = Image.new("RGB", (8, 8), "white")
        pictures = [[row.get(title, blank) for title in titles] for row in rows]
        legend = list(zip(self._info.classes, self._info.colours, strict=True))
        drawn = panel(titles, pictures, legend, _HEIGHT, _WIDTH, _TEXT)
        save(drawn, stage.folder / "panels" / f"epoch_{epoch:03d}.png")
        stage.show("query_panel", drawn, iteration)

    def _row_of_votes(self, number: int, predict: Predictor, epoch: int) -> dict[str, Picture]:
        sample = self._samples.unlabeled[number]
        image, label = read_picture(sample), np.asarray(read_label(sample))
        size = base_size((image.height, image.width), self._stage.config.inference.long_side)
        pixels = to_input(image, self._samples.preprocessing).unsqueeze(0)
        evidence = read_votes(self._labeled_by, sample)
        row: dict[str, Picture] = {"unlabeled image": image}
        if evidence is not None:
            row["teacher"] = self._in_colour(evidence.teacher)
            row["votes"] = self._in_colour(evidence.votes)
        row["both: pseudo label"] = self._in_colour(label)
        row["wrong in it (red)"] = self._errors(sample, image, label)
        for place, (name, share) in enumerate(evidence.voters if evidence is not None else [], 1):
            voter = self._labeled[name]
            ids = np.asarray(read_label(voter))
            picture = overlay(read_picture(voter), ids, self._info.palette())
            row[f"voter {place}"] = picture, f"{share:.0%} of the votes"
        ids = predict(pixels, size).argmax(dim=1)[0]
        row[f"student, epoch {epoch}"] = self._in_colour(ids)
        return row

    def _row_of_training(self, number: int, predict: Predictor, epoch: int) -> dict[str, Picture]:
        """Show the training sample of an image as this epoch has it."""
        key, sample = SampleKey(epoch - 1, number), self._samples.unlabeled[number]
        batch: RetrainSample = self._stage.device.move(default_collate([self._samples[key]]))
        with self._stage.device.autocast():
            label, weight = self._labeler(batch)
        image = as_picture(batch.image[0], self._samples.preprocessing)
        row: dict[str, Picture] = {
            "unlabeled crop": image,
            "pseudo label": self._in_colour(label[0]),
            "wrong in it (red)": self._crop_errors(key, sample, image, label[0]),
        }
        if isinstance(batch.partner, Partner):
            row["labeled partner"] = self._partner(batch.partner)
        if self._labeler.settings.weight == "cisc_map":
            with self._stage.device.autocast():
                row["CISC map (white: 1)"] = in_grey(_array(self._labeler.cisc_map(batch)[0]))
        if self._labeler.settings.weight == "cisc_map" or self._labeler.settings.threshold:
            row["weight (white: 1)"] = in_grey(_array((weight * (label != IGNORE))[0]))
        ids = predict(batch.image, tuple(label.shape[-2:])).argmax(dim=1)[0]
        row[f"student, epoch {epoch}"] = self._in_colour(ids)
        return row

    def _partner(self, partner: Partner) -> Picture:
        shared = int(partner.shared_class)
        picture = as_picture(partner.image[0], self._samples.preprocessing)
        name = "no shared class" if shared == IGNORE else self._info.classes[shared]
        return overlay(picture, _ids(partner.label[0]), self._info.palette()), name

    def _crop_errors(
        self, key: SampleKey, sample: Sample, image: Image.Image, label: Tensor
    ) -> Picture:
        """Mark errors in a training crop; the true mask is cut as it was."""
        if sample.name not in self._truth:
            return image, "no true mask"
        true = self._samples.view(key).mask(read_label(self._truth[sample.name]))
        return _mark_errors(image, _ids(label), np.asarray(true))

    def _errors(self, sample: Sample, image: Image.Image, ids: np.ndarray) -> Picture:
        if sample.name not in self._truth:
            return image, "no true mask"
        return _mark_errors(image, ids, np.asarray(read_label(self._truth[sample.name])))

    def _in_colour(self, ids: np.ndarray | Tensor) -> Image.Image:
        return in_colour(_ids(ids) if isinstance(ids, Tensor) else ids, self._info.palette())


def _mark_errors(image: Image.Image, ids: np.ndarray, true: np.ndarray) -> Picture:
    counted = (true != IGNORE) & (ids != IGNORE)
    wrong = counted & (true != ids)
    return mark_places(image, wrong), f"{wrong.sum() / max(1, counted.sum()):.0%}"


def _ids(label: Tensor) -> np.ndarray:
    return label.byte().cpu().numpy()


def _array(values: Tensor) -> np.ndarray:
    return values.float().cpu().numpy()
