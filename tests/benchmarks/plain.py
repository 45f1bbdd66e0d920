"""The plain forms that ``stages.py`` compares with: the formulas of docs/method.md as written.

fp32 (torch's: a GPU's convolutions round to TF32), contiguous, whole images one at a time (which
workers may read), features resized to the images' size, a pass for every class, a loss read off the
device at every step.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from dataset.lists import Sample
from dataset.reading import read_image, read_mask, to_input, to_label
from dataset.training import LabeledPair, RetrainSample
from model.ops.dilated import DilatedConv2d, DilatedDepthwiseConv2d
from utils import IGNORE, IMAGENET
from utils.evaluation import ConfusionMatrix


def plain_network(net: nn.Module) -> nn.Module:
    """Let torch's own kernels do the dilated and depthwise convolutions."""
    for module in net.modules():
        if isinstance(module, DilatedConv2d | DilatedDepthwiseConv2d):
            module.__class__ = nn.Conv2d
    return net


def pool(features: Tensor, region: Tensor) -> Tensor:
    """docs/method.md, section 1, as it is written."""
    resized = F.interpolate(features, region.shape[-2:], mode="bilinear", align_corners=False)
    region = region.unsqueeze(1).to(features.dtype)
    return (resized * region).sum(dim=(2, 3)) / (region.sum(dim=(2, 3)) + 0.0005)


def similarity(features: Tensor, prototype: Tensor, size: Sequence[int]) -> Tensor:
    """docs/method.md, section 2, as it is written."""
    cosine = F.cosine_similarity(features, prototype[:, :, None, None]).clamp(0, 1)
    return F.interpolate(cosine.unsqueeze(1), size, mode="bilinear", align_corners=False)[:, 0]


def entropy(similar: Tensor, region: Tensor, label: Tensor) -> Tensor:
    loss = F.binary_cross_entropy(similar.clamp(1e-6, 1 - 1e-6), region.float(), reduction="none")
    valid = label != IGNORE
    return (loss * valid).sum() / valid.sum().clamp_min(1)


def regions(label: Tensor, shared: Tensor) -> Tensor:
    return (label == shared[:, None, None]) & (label != IGNORE)


def supervised_step(net: nn.Module, optimizer: torch.optim.Optimizer, pair: LabeledPair) -> float:
    first, second = net(pair.image), net(pair.partner_image)
    loss = F.cross_entropy(first.logits, pair.label, ignore_index=IGNORE)
    loss = loss + F.cross_entropy(second.logits, pair.partner_label, ignore_index=IGNORE)
    region = regions(pair.label, pair.shared_class)
    partner_region = regions(pair.partner_label, pair.shared_class)
    size = pair.label.shape[-2:]
    there = similarity(first.features, pool(second.features, partner_region), size)
    back = similarity(second.features, pool(first.features, region), size)
    loss = (
        loss
        + entropy(there, region, pair.label)
        + entropy(back, partner_region, pair.partner_label)
    )
    return step(optimizer, loss)


def retrain_step(
    net: nn.Module, teacher: nn.Module, optimizer: torch.optim.Optimizer, batch: RetrainSample
) -> float:
    partner = batch.partner
    with torch.no_grad():
        features, partner_features = teacher(batch.image).features, teacher(partner.image).features
        prototype = pool(partner_features, regions(partner.label, partner.shared_class))
        size = batch.pseudo_label.shape[-2:]
        region = regions(batch.pseudo_label, partner.shared_class)
        weight = 1 - (region.float() - similarity(features, prototype, size)).abs()
    logits = net(batch.student_image[:, 0]).logits
    pixels = F.cross_entropy(logits, batch.pseudo_label, ignore_index=IGNORE, reduction="none")
    loss = (pixels * weight).sum() / (batch.pseudo_label != IGNORE).sum()
    labeled = net(batch.labeled_image).logits
    loss = loss + F.cross_entropy(labeled, batch.labeled_label, ignore_index=IGNORE)
    return step(optimizer, loss)


def step(optimizer: torch.optim.Optimizer, loss: Tensor) -> float:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


class Pictures(Dataset):
    """Normalised images, with their labels if they have masks."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        sample = self.samples[index]
        image = to_input(read_image(sample.image), IMAGENET)
        return image, to_label(read_mask(sample.mask)) if sample.mask else torch.zeros(0)


def loaded(
    samples: Sequence[Sample], device: torch.device, workers: int
) -> Iterator[tuple[Sample, Tensor, Tensor]]:
    """Yield images, (1, 3, H, W), and labels on the device, one by one."""
    loader = DataLoader(Pictures(samples), num_workers=workers)
    for sample, (image, label) in zip(samples, loader, strict=True):
        yield sample, image.to(device), label.to(device)


@torch.no_grad()
def pseudo_label(
    net: nn.Module,
    samples: Sequence[Sample],
    scales: Sequence[float],
    device: torch.device,
    folder: Path,
    workers: int = 0,
) -> None:
    def resized(maps: Tensor, size: Sequence[int]) -> Tensor:
        return F.interpolate(maps, size, mode="bilinear", align_corners=True)

    for sample, image, _ in loaded(samples, device, workers):
        total, size = 0.0, image.shape[-2:]
        for scale in scales:
            view = resized(image, [round(side * scale) for side in size])
            total = total + resized(net(view).logits, size).softmax(dim=1)
            mirrored = net(view.flip(-1)).logits.flip(-1)
            total = total + resized(mirrored, size).softmax(dim=1)
        ids = total.argmax(dim=1)[0].byte().cpu().numpy()
        Image.fromarray(ids).save(folder / f"{Path(sample.name).stem}.png")


@torch.no_grad()
def evaluate(
    net: nn.Module,
    samples: Sequence[Sample],
    classes: int,
    device: torch.device,
    workers: int = 0,
) -> ConfusionMatrix:
    matrix = ConfusionMatrix(classes)
    for _, image, label in loaded(samples, device, workers):
        matrix.update(net(image).logits.argmax(dim=1).cpu(), label.cpu())
    return matrix


@torch.no_grad()
def select(
    net: nn.Module,
    labeled: Sequence[Sample],
    pseudo_labeled: Sequence[Sample],
    device: torch.device,
    workers: int = 0,
) -> tuple[dict[tuple[int, str], float], dict[str, float]]:
    """Anchors, guides and scores: a pass for each class of an image, of a labeled one two."""

    def class_by_class(samples: Sequence[Sample]) -> Iterator[tuple[str, Tensor, Tensor, int]]:
        for sample, image, label in loaded(samples, device, workers):
            for class_id in np.unique(label[label != IGNORE].cpu().numpy()):
                yield sample.name, image, label, int(class_id)

    seen: dict[int, list[Tensor]] = {}
    for _, image, label, class_id in class_by_class(labeled):
        seen.setdefault(class_id, []).append(pool(net(image).features, label == class_id))
    anchors = {class_id: torch.cat(rows).mean(dim=0) for class_id, rows in seen.items()}

    def scores(samples: Sequence[Sample]) -> Iterator[tuple[int, str, float]]:
        for name, image, label, class_id in class_by_class(samples):
            if class_id in anchors:
                features, anchor = net(image).features, anchors[class_id][None]
                similar = similarity(features, anchor, label.shape[-2:])
                yield class_id, name, -entropy(similar, label == class_id, label).item()

    guides = {(class_id, name): value for class_id, name, value in scores(labeled)}
    images = dict.fromkeys((sample.name for sample in pseudo_labeled), 0.0)
    for _, name, value in scores(pseudo_labeled):
        images[name] += value
    return guides, images
