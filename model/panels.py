"""Query panels: what is queried for unlabeled images, what that weighs down, what is learnt."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import default_collate

from dataset.catalog import describe
from dataset.lists import Sample, read_label
from dataset.loader import Chance
from dataset.query import QueriedImage, Querier
from dataset.reading import to_input, to_label
from dataset.training import RetrainSample
from model.cisc import class_region, masked_average_pooling, similarity_map
from utils import IGNORE
from utils.distributed import by_first
from utils.evaluation import Predictor, base_size, resize_images
from utils.panels import Picture, as_picture, in_colour, in_grey, marked, overlay, panel, save
from utils.run.stages import Stage

_HEIGHT, _WIDTH, _TEXT = 170, 170, 14  # pixels: a picture at most; letters


class QueryPanels:
    """Draws the same unlabeled images as a retraining stage goes on; changes no result.

    Whole images, where training sees crops. Random numbers of training are not used.

    Args:
        stage: gets ``panels/epoch_007.png`` and so on, and shows them where it logs.
        samples: images with pseudo labels; ``panels.images`` of them, evenly spaced, are drawn.
        truth: true masks by image name, to mark wrong pseudo labels.
        querier: draws labeled images.
        teacher: frozen; CISC maps compare its features.
        judge: labels and weighs a batch of one as training does: (1, H, W) long, 255 = ignored,
            and (1, H, W) float in [0, 1].
    """

    def __init__(
        self,
        stage: Stage,
        samples: Sequence[Sample],
        truth: Mapping[str, Sample],
        querier: Querier,
        teacher: nn.Module,
        judge: Callable[[RetrainSample], tuple[Tensor, Tensor]],
    ) -> None:
        count = min(stage.config.panels.images, len(samples))
        self._samples = [samples[number * len(samples) // count] for number in range(count)]
        self._stage, self._querier, self._teacher = stage, querier, teacher
        self._truth, self._judge = truth, judge
        self._kind = describe(stage.config.dataset)
        self._chance = Chance(stage.config.seed, "panels")

    @by_first
    @torch.no_grad()
    def draw(self, net: nn.Module, epoch: int, iteration: int) -> None:
        """Draw the images with a network's predictions after so many epochs and iterations."""
        stage, known = self._stage, any(sample.name in self._truth for sample in self._samples)
        if not self._samples:
            return
        predict = Predictor(net.eval(), stage.device, stage.config.inference)
        rows = [self._row(number, predict) for number in range(len(self._samples))]
        titles = {
            "image": "unlabeled image",
            "label": "pseudo label",
            "wrong": "wrong in it (red)",
            "queried": "queried labeled image",
            "cisc": "CISC map (white: 1)",
            "weight": "weight (white: 1)",  # 0 where the label is ignored
            "prediction": f"student, epoch {epoch}",
        }
        if not known:
            del titles["wrong"]
        pictures = [[row[key] for key in titles] for row in rows]
        legend = list(zip(self._kind.classes, self._kind.colours, strict=True))
        drawn = panel(list(titles.values()), pictures, legend, _HEIGHT, _WIDTH, _TEXT)
        save(drawn, stage.folder / "panels" / f"epoch_{epoch:03d}.png")
        stage.show("query_panel", drawn, iteration)

    def _row(self, number: int, predict: Predictor) -> dict[str, Picture]:
        sample, device, teacher = self._samples[number], self._stage.device, self._teacher
        preprocessing, palette = teacher.preprocessing, self._kind.palette()
        image, mask = self._querier.read(sample)
        long_side = self._stage.config.inference.long_side
        size = base_size((image.height, image.width), long_side)
        mask = _resized(mask, size)
        pixels = device.move(to_input(image, preprocessing).unsqueeze(0))
        rng = self._chance.of(number)
        queried = self._querier.draw(sample.name, mask, rng, preprocessing)
        queried = device.move(default_collate([queried]))
        images = resize_images(pixels, size, preprocessing.interpolation)
        label = device.move(to_label(mask).unsqueeze(0))
        with device.autocast():
            judged, weight = self._judge(RetrainSample(images, label, None, None, None, queried))
            region = class_region(queried.label, queried.shared_class)
            prototype = masked_average_pooling(teacher.extract(queried.image), region)
            cisc = similarity_map(teacher.extract(images), prototype, size)
        image = image.resize(size[::-1], Image.Resampling.BICUBIC)
        ids = judged[0].byte().cpu().numpy()
        weight = (weight * (judged != IGNORE))[0].float().cpu().numpy()
        prediction = predict(pixels, size).argmax(dim=1)[0].byte().cpu().numpy()
        return {
            "image": image,
            "label": in_colour(ids, palette),
            "wrong": self._errors(sample, image, ids),
            "queried": self._queried(queried),
            "cisc": in_grey(cisc[0].float().cpu().numpy()),
            "weight": in_grey(weight),
            "prediction": in_colour(prediction, palette),
        }

    def _queried(self, queried: QueriedImage) -> Picture:
        shared, palette = int(queried.shared_class), self._kind.palette()
        picture = as_picture(queried.image[0], self._teacher.preprocessing)
        label = queried.label[0].byte().cpu().numpy()
        name = "no shared class" if shared == IGNORE else self._kind.classes[shared]
        return overlay(picture, label, palette), name

    def _errors(self, sample: Sample, image: Image.Image, ids: np.ndarray) -> Picture:
        if sample.name not in self._truth:
            return image, "no true mask"
        true = np.asarray(_resized(read_label(self._truth[sample.name]), ids.shape))
        counted = (true != IGNORE) & (ids != IGNORE)
        wrong = counted & (true != ids)
        return marked(image, wrong), f"{wrong.sum() / max(1, counted.sum()):.0%}"


def _resized(mask: Image.Image, size: tuple[int, int]) -> Image.Image:
    return mask.resize(size[::-1], Image.Resampling.NEAREST)
