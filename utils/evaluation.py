"""From a network to class probabilities and scores: views, windows, confusion matrix."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from utils.config.schema import InferenceSection, PseudoLabelSection, WindowSection
from utils.device import Device
from utils.distributed import all_reduce_sum, world
from utils.progress import no_bar
from utils.run.signals import stop_here
from utils.scores import Groups, align, by_class, describe_mean, dice_of, percent, report_groups


class ConfusionMatrix:
    """Counts of (true class, predicted class) over all pixels seen.

    Args:
        num_classes: C. Pixels whose label is not in [0, C), 255 among them, are excluded.
        device: where predictions and labels are, and the counts.
        groups: of the images, which are also counted group by group; None: they are not.
    """

    def __init__(
        self,
        num_classes: int,
        device: torch.device | str = "cpu",
        groups: Groups | None = None,
    ) -> None:
        self.num_classes, self.groups = num_classes, groups
        count = 0 if groups is None else len(groups.names)
        cells = count, num_classes, num_classes
        self.by_group = torch.zeros(*cells, dtype=torch.int64, device=device)
        self.counts = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)

    def update(self, prediction: Tensor, label: Tensor, index: Sequence[int] = ()) -> None:
        """Count the pixels of integer tensors of equal shape; predictions are in [0, C).

        Where there are groups, ``index`` holds the places in the list of the images of a batch.
        """
        self.counts += confusion_counts(prediction[None], label[None], self.num_classes)[0]
        if self.groups is not None:
            of_images = confusion_counts(prediction, label, self.num_classes)
            for image, counts in zip(index, of_images, strict=True):
                self.by_group[self.groups.of_images[image]] += counts

    def reduce(self) -> "ConfusionMatrix":
        """Sum the counts over the processes; return itself. Collective."""
        self.counts = all_reduce_sum(self.counts)
        if self.groups is not None:
            self.by_group = all_reduce_sum(self.by_group)
        return self

    def iou(self) -> Tensor:
        """(C,) float64 in [0, 1]; NaN for a class that is in neither labels nor predictions."""
        counts = self.counts.cpu()  # not every device has float64
        hits = counts.diagonal().double()
        return hits / (counts.sum(dim=0) + counts.sum(dim=1) - hits)

    def mean_iou(self) -> float:
        """Mean in [0, 1] over classes that occur in label or prediction; NaN if none does."""
        return self.iou().nanmean().item()

    def pixel_accuracy(self) -> float:
        """Share of the counted pixels that are right, in [0, 1]; NaN if none was counted."""
        return (self.counts.diagonal().sum() / self.counts.sum()).item()

    def report(self, classes: Sequence[str]) -> dict[str, Any]:
        """Return mean IoU and Dice, both by class name, and pixel accuracy.

        None for a class that is not seen. With groups also ``report_groups`` of these.
        """
        dice = dice_of(self.iou())
        found = {
            "miou": self.mean_iou(),
            "dice": dice.nanmean().item(),
            "pixel_accuracy": self.pixel_accuracy(),
            "per_class_iou": by_class(self.iou(), classes),
            "per_class_dice": by_class(dice, classes),
        }
        if self.groups is not None:
            found["by_group"] = report_groups(self.by_group.cpu().numpy(), classes)
        return found


def confusion_counts(prediction: Tensor, label: Tensor, num_classes: int) -> Tensor:
    """Count the pixels of every pair of classes in each image, all images at once.

    Args:
        prediction: (B, ...) integer, in [0, C).
        label: (B, ...) integer; pixels that are not in [0, C), 255 among them, are excluded.
        num_classes: C.

    Returns:
        (B, C, C) int64 by true class and predicted class, on the device.
    """
    count, cells = len(label), num_classes**2
    valid = (label >= 0) & (label < num_classes)
    # What is excluded has a cell of its own: cutting it out would wait for the device.
    cell = torch.where(valid, label.long() * num_classes + prediction.long(), cells)
    cell = cell.flatten(1) + (cells + 1) * torch.arange(count, device=label.device).unsqueeze(1)
    counts = torch.bincount(cell.flatten(), minlength=count * (cells + 1)).view(count, cells + 1)
    return counts[:, :cells].reshape(count, num_classes, num_classes)


def iterate_batches(loader: DataLoader, device: Device, title: str) -> Iterator[Any]:
    """Iterate over batches of whole images, on the device, with a progress bar. Collective.

    Args:
        loader: of ``dataset.loader.whole_images``; the bytes that it reads become numbers on the
            device. ``index``, the positions in the list, stays on the CPU, which asks for it.
        device: where the batches go.
        title: of the bar.
    """
    count = sum(map(len, loader.batch_sampler))
    with tqdm(desc=title, total=count, disable=no_bar(), leave=False, unit="image") as bar:
        for batch in loader:
            yield loader.dataset.to_numbers(device.move(batch))._replace(index=batch.index)
            bar.update(len(batch.index))
            if world() == 1:  # several processes can have unequal numbers of batches
                stop_here()
    stop_here()


@dataclass(frozen=True)
class Predictor:
    """Class probabilities of images, averaged over several views.

    Attributes:
        net: in eval mode; ``classify(extract(images))`` gives logits of any size,
            ``preprocessing.interpolation`` says how images are resized.
        device: where and in which precision.
        settings: ``long_side``, windows, and at which size views are averaged.
        views: ``scales`` and ``flip``; None: those of ``settings``.
    """

    net: nn.Module
    device: Device
    settings: InferenceSection
    views: InferenceSection | PseudoLabelSection | None = None

    @torch.inference_mode()
    def __call__(self, images: Tensor, size: tuple[int, int]) -> Tensor:
        """Predict (B, C, H, W) float32 probabilities, on the device; they sum to 1 over C.

        Args:
            images: (B, 3, h, w) float, normalised, at the size of their files, on any device.
            size: (H, W) of the result, which may differ from the images'.
        """
        images, views = self.device.move(images), self.views or self.settings
        count = len(views.scales) * (2 if views.flip else 1)
        common = size if count == 1 else _scale_size(size, self.settings.average_at)
        base = base_size(images.shape[-2:], self.settings.long_side)
        summed = 0.0
        for scale in views.scales:  # each view is resized once from the file's own pixels
            view = resize_images(
                images, _scale_size(base, scale), self.net.preprocessing.interpolation
            )
            if views.flip:
                both = self._probabilities(torch.cat([view, view.flip(-1)]), common)
                straight, mirrored = both.chunk(2)
                summed = summed + straight + mirrored.flip(-1)
            else:
                summed = summed + self._probabilities(view, common)
        return _resize_maps(summed / count, size)

    def _probabilities(self, images: Tensor, size: tuple[int, int]) -> Tensor:
        window = self.settings.window
        if window is None or max(images.shape[-2:]) <= window.size:
            return _resize_maps(self._logits(images), size).softmax(dim=1)
        return _resize_maps(self._by_windows(images, window), size)

    def _by_windows(self, images: Tensor, window: WindowSection) -> Tensor:
        """Average the probabilities of all windows that show a pixel, at the images' size."""
        height, width = images.shape[-2:]
        shape = min(window.size, height), min(window.size, width)
        weight = _window_weight(shape, window.weighting, images.device)
        starts = [
            [*range(0, length - side, max(1, round(side * window.step))), length - side]
            for length, side in zip((height, width), shape, strict=True)
        ]  # the last windows end at the edges of the image
        places = [
            (slice(top, top + shape[0]), slice(left, left + shape[1]))
            for top, left in product(*starts)
        ]
        summed, weights = 0.0, torch.zeros(height, width, device=images.device)
        step = max(1, window.batch_size // len(images))  # windows of each image in a batch
        for start in range(0, len(places), step):
            chosen = places[start : start + step]
            crops = torch.cat([images[..., rows, columns] for rows, columns in chosen])
            logits = torch.cat([self._logits(part) for part in crops.split(window.batch_size)])
            answers = _resize_maps(logits, shape).softmax(dim=1).chunk(len(chosen))
            for (rows, columns), answer in zip(chosen, answers, strict=True):
                if isinstance(summed, float):
                    summed = answer.new_zeros(len(images), answer.shape[1], height, width)
                summed[..., rows, columns] += answer * weight
                weights[rows, columns] += weight
        return summed / weights

    def _logits(self, images: Tensor) -> Tensor:
        """Return logits at the size that the network has them in."""
        with self.device.autocast():
            return self.net.classify(self.net.extract(images)).float()


@dataclass(frozen=True)
class Average:
    """Class probabilities averaged over networks; called as ``Predictor`` is.

    Attributes:
        predictors: of networks that share classes and preprocessing.
    """

    predictors: Sequence[Predictor]

    @property
    def device(self) -> Device:
        """The device of the first one."""
        return self.predictors[0].device

    def __call__(self, images: Tensor, size: tuple[int, int]) -> Tensor:
        """Predict (B, C, H, W) float32 probabilities; they sum to 1 over C."""
        summed = sum(
            predict(images, size).to(self.device.torch_device) for predict in self.predictors
        )
        return summed / len(self.predictors)


def validate(
    predict: Predictor,
    loader: DataLoader,
    num_classes: int,
    keep: Callable[[int, Tensor], None] | None = None,
    groups: Groups | None = None,
) -> ConfusionMatrix:
    """Compare predictions with labels, at the labels' own size. Collective.

    Args:
        predict: the network and its views.
        loader: whole images with labels.
        num_classes: C.
        keep: takes the index and the predicted ids, (H, W) uint8 on the CPU, of every image of
            this process.
        groups: of the list's images; None: there are none.

    Returns:
        The matrix over the images of all processes.
    """
    matrix = ConfusionMatrix(num_classes, predict.device.torch_device, groups)
    for batch in iterate_batches(loader, predict.device, "evaluating"):
        ids = predict(batch.image, tuple(batch.label.shape[-2:])).argmax(dim=1)
        matrix.update(ids, batch.label, batch.index.tolist())
        if keep is not None:
            for index, mask in zip(batch.index.tolist(), ids.byte().cpu(), strict=True):
                keep(index, mask)
    return matrix.reduce()


def base_size(size: Sequence[int], long_side: int | None) -> tuple[int, int]:
    """Return the size at scale 1: the image's own, shrunk to ``long_side`` where it is larger."""
    return _scale_size(size, 1.0 if long_side is None else min(1.0, long_side / max(size)))


def _scale_size(size: Sequence[int], scale: float) -> tuple[int, int]:
    return tuple(max(1, round(side * scale)) for side in size)


def resize_images(images: Tensor, size: tuple[int, int], interpolation: str) -> Tensor:
    """Resize (B, 3, h, w) images to (B, 3, H, W), antialiased as the images of training are."""
    if tuple(images.shape[-2:]) == tuple(size):
        return images
    return F.interpolate(images, size, mode=interpolation, align_corners=False, antialias=True)


def _window_weight(shape: tuple[int, int], weighting: str, device: torch.device) -> Tensor:
    """Return the weight of each pixel of a window, (h, w): all 1, or a Gaussian at its centre."""
    if weighting == "uniform":
        return torch.ones(shape, device=device)
    places = [(torch.arange(side, device=device) + 0.5) / side - 0.5 for side in shape]
    sigma = 0.25  # of the side
    return torch.outer(*(torch.exp(-0.5 * (place / sigma) ** 2) for place in places))


def _resize_maps(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize logits or probabilities, corners aligned as in the published networks."""
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    return F.interpolate(maps, size, mode="bilinear", align_corners=True)


def lay_out_scores(results: dict[str, Any]) -> str:
    """Lay out IoU and Dice by class, also by group if there are groups, in percent."""
    columns = {"IoU": results["per_class_iou"], "Dice": results["per_class_dice"]}
    means, groups = [results["miou"], results["dice"]], results.get("by_group")
    if groups is not None:
        columns |= {
            "IoU by group": groups["per_class_iou"],
            "Dice by group": groups["per_class_dice"],
        }
        means += [groups["iou"], groups["dice"]]
    names = [*results["per_class_iou"]]
    rows = [["", *columns]]
    rows += [[name, *(percent(column[name]) for column in columns.values())] for name in names]
    rows.append(["mean", *map(percent, means)])
    blank = [""] * (len(columns) - 1)
    rows.append(["pixel accuracy", percent(results["pixel_accuracy"]), *blank])
    lines = [align(rows)]
    if groups is not None:
        lines.append(f"by group: {groups['groups']} groups; mean without '{names[0]}'")
    if few := describe_mean(results["per_class_iou"]):
        lines.append(f"mean {few}")
    return "\n".join(lines)
