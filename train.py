"""Train a segmentation network on few labels and many images: the six stages of CISC-R.

python train.py --config pascal.yaml [section.key=value ...] [--from-stage N]
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from dataset.cache import sample_reader
from dataset.catalog import describe
from dataset.loader import Chance, training_batches
from dataset.query import Querier, QueryIndex, QueryRule, build_query_index
from dataset.segmentation import (
    LabeledPairs,
    RetrainSamples,
    queried_image,
    queried_prototype,
)
from dataset.selection import count_kept, read_selection, write_csv, write_selection
from dataset.splits import (
    Sample,
    SampleReader,
    Splits,
    mask_file,
    read_splits,
    with_pseudo_masks,
)
from eval import build_network, draw_examples, predictor, report, validate, whole_batches
from model.cisc import class_prototypes, image_reliability, reliability
from model.losses import cross_entropy, ohem_cross_entropy
from model.objectives import (
    Guide,
    LabeledLoss,
    Loss,
    retrain_loss,
    supervised_loss,
    weight_by_bank,
    weight_by_image,
)
from utils.checkpoint import load_weights
from utils.config import Config, TrainingSection
from utils.errors import UserError, exit_with_one_line
from utils.frozen import frozen
from utils.optimization import Optimization
from utils.panels import save_mask
from utils.progress import StageBar
from utils.read_config import read_config
from utils.records import Queried
from utils.run import Run
from utils.spill import Spill
from utils.stage import Report, Stage, checkpoint_of


def train(config: Config, from_stage: int | None = None) -> None:
    """Run the six stages, or those that are left of them."""
    kind, splits = describe(config.dataset), read_splits(config.dataset)
    _refuse_large_batches(config, splits)
    index = build_query_index(splits.labeled, QueryRule.of(config.query, kind))
    with Run(config, from_stage) as run:
        first = run.stage("1_supervised", train_supervised, splits, index)
        masks = run.stage("2_pseudo_label", write_pseudo_labels, first, splits.unlabeled)
        chosen = run.stage("3_select", select, first, splits, masks, index)
        reliable, unreliable, index = read_selection(chosen, splits.unlabeled, kind.classes)
        pseudo_labeled = with_pseudo_masks(reliable, masks / "masks")
        second = run.stage("4_retrain", retrain, splits, pseudo_labeled, first, index)
        masks = run.stage("5_relabel", write_pseudo_labels, second, unreliable)
        pseudo_labeled += with_pseudo_masks(unreliable, masks / "masks")
        final = run.stage("6_retrain", retrain, splits, pseudo_labeled, second, index)
        run.finish()
        draw_examples(run.folder / "examples.png", splits.val, config, run.device, first, final)


def train_supervised(stage: Stage, splits: Splits, index: QueryIndex) -> Report:
    """Stage 1: labeled pairs, cross entropy on both images and the consistency loss."""
    config, chance = stage.config, Chance(stage.config.seed, stage.name)
    read = sample_reader(config.cache, splits.labeled, config.workers)
    querier, repeat = _querier(config, splits, index, read), _repeat(config, splits)
    pairs = LabeledPairs(splits.labeled, querier, config.augment, chance, repeat, read)
    net = _new_network(stage, chance)
    loss = partial(supervised_loss, net, _labeled_loss(config), config.supervised.consistency)
    return fit(stage, net, loss, pairs, config.supervised, splits.val)


@torch.inference_mode()
def write_pseudo_labels(stage: Stage, teacher: Path, unlabeled: Sequence[Sample]) -> Report:
    """Stages 2 and 5: the teacher's most probable class of every pixel, as palette PNGs."""
    settings, palette = stage.config.pseudo_label, describe(stage.config.dataset).palette()
    net = _teacher(stage, teacher)
    predict = predictor(net, stage.device, stage.config.inference, settings)
    confidences: dict[str, float] = {}
    for chosen, batch in whole_batches(unlabeled, stage.config, stage.device, stage.name):
        probabilities, ids = predict(batch.image, tuple(batch.label.shape[-2:])).max(dim=1)
        means = probabilities.mean(dim=(1, 2)).tolist()
        for sample, mask, mean in zip(chosen, ids.byte().cpu().numpy(), means, strict=True):
            save_mask(mask_file(stage.folder / "masks", sample), mask, palette)
            confidences[sample.name] = mean
    write_csv(stage.folder / "confidence.csv", ("image", "confidence"), confidences.items())
    mean = sum(confidences.values()) / max(1, len(confidences))
    return {"images": len(confidences), "confidence": mean}


@torch.inference_mode()
def select(stage: Stage, teacher: Path, splits: Splits, masks: Path, index: QueryIndex) -> Report:
    """Stage 3: which pseudo labels, and which labeled images of each class, are reliable."""
    settings, classes = stage.config.select, describe(stage.config.dataset).classes
    net = _teacher(stage, teacher)

    def passed(samples: Sequence[Sample], title: str) -> Iterator[tuple[list, Tensor, Tensor]]:
        """Yield batches: samples, features, labels."""
        title = f"{stage.name} {title}"
        for chosen, batch in whole_batches(samples, stage.config, stage.device, title):
            with stage.device.autocast():
                features = net.extract(batch.image)
            yield chosen, features, batch.label

    total, count = 0.0, 0
    kept = Spill(stage.folder / "features", stage.device.device)
    for chosen, features, label in passed(splits.labeled, "labeled"):
        prototypes, present = class_prototypes(features, label, len(classes))
        total, count = total + prototypes.sum(dim=0), count + present.sum(dim=0).unsqueeze(1)
        kept.add([sample.name for sample in chosen], features, label)
    anchors = total / count  # NaN, 0 / 0, for a class that no label shows

    guides: dict[tuple[int, str], float] = {}
    for names, features, label in kept:
        for name, scores in zip(names, reliability(features, label, anchors), strict=True):
            for class_id in scores.isfinite().nonzero().flatten().tolist():
                guides[class_id, name] = scores[class_id].item()
    images: dict[str, float] = {}
    pseudo_labeled = with_pseudo_masks(splits.unlabeled, masks / "masks")
    for chosen, features, label in passed(pseudo_labeled, "unlabeled"):
        scores = image_reliability(reliability(features, label, anchors), settings.score == "mean")
        images.update(zip((sample.name for sample in chosen), scores.tolist(), strict=True))
    reliable = write_selection(stage.folder, images, guides, index, settings.keep, classes)
    return {"images": reliable}


def retrain(
    stage: Stage,
    splits: Splits,
    pseudo_labeled: Sequence[Sample],
    teacher: Path,
    index: QueryIndex,
) -> Report:
    """Stages 4 and 6: a new network on labeled and pseudo-labeled images."""
    config, chance = stage.config, Chance(stage.config.seed, stage.name)
    read = sample_reader(config.cache, [*pseudo_labeled, *splits.labeled], config.workers)
    query, guide = _guidance(stage, splits, teacher, _querier(config, splits, index, read))
    strong = config.retrain.teacher_view == "strong"
    samples = RetrainSamples(
        pseudo_labeled, splits.labeled, query, config.augment, chance, strong, read
    )
    net = _new_network(stage, chance)
    loss = partial(retrain_loss, net, guide, _labeled_loss(config))
    outcome = fit(stage, net, loss, samples, config.retrain, splits.val)
    return {"images": len(samples), **outcome}


def fit(
    stage: Stage,
    net: nn.Module,
    loss: Callable[[Any], Loss],
    dataset: Dataset,
    settings: TrainingSection,
    val: Sequence[Sample],
) -> Report:
    """The one training loop; writes ``checkpoint.pth``, and goes on after the last whole epoch."""
    config, device = stage.config, stage.device
    chance, steps = Chance(config.seed, stage.name), len(dataset) // settings.batch_size
    optimization = Optimization(net, config.optimizer, steps * settings.epochs, device.scaler())
    first, outcome = stage.resume(net, optimization)
    epochs = range(first, settings.epochs)
    batches = training_batches(dataset, settings.batch_size, epochs, chance, config.workers)
    best = config.evaluate.checkpoint == "best"
    with StageBar(stage.name, epochs, steps, images=2 * settings.batch_size) as bar:
        for epoch in epochs:
            net.train()
            torch.manual_seed(chance.torch_seed(epoch))  # dropout
            bar.start(epoch)
            for batch in islice(batches, steps):
                with device.autocast():
                    step = loss(device.move(batch))
                bar.update(step.shown, optimization.lr)
                optimization.step(step.total, f"{stage.name}, epoch {epoch + 1}")
            numbers, last = bar.means(), epoch + 1 == settings.epochs
            if last or (epoch + 1) % config.evaluate.every == 0:
                matrix = validate(net, val, config, device)
                numbers["miou"] = matrix.mean_iou()
                if numbers["miou"] > outcome.get("miou", -1.0) if best else last:
                    outcome = {**numbers, **report(matrix, config), "epoch": epoch + 1}
                    stage.save(net, epoch + 1)
            stage.record(epoch + 1, numbers)
            stage.suspend(net, optimization, epoch + 1, outcome)
    return outcome


def _new_network(stage: Stage, chance: Chance) -> nn.Module:
    """Build a network from the backbone's weights and the stage's random numbers."""
    torch.manual_seed(chance.torch_seed())
    return stage.device.place(build_network(stage.config, stage.config.model.pretrained))


def _teacher(stage: Stage, folder: Path) -> nn.Module:
    """Load the network of a finished stage, frozen."""
    net = build_network(stage.config, pretrained=None)
    load_weights(net, checkpoint_of(folder))
    return frozen(net, stage.device)


def _guidance(
    stage: Stage, splits: Splits, teacher: Path, querier: Querier
) -> tuple[Callable[..., Queried], Guide | None]:
    """Return what samples query for, and how that weighs their pseudo labels."""
    settings = stage.config.retrain
    if not settings.rectify:
        return partial(queried_prototype, querier), None
    net = _teacher(stage, teacher)
    if settings.query == "image":
        return partial(queried_image, querier), partial(weight_by_image, net)
    bank = prototype_bank(stage, net, splits.labeled)
    return partial(queried_prototype, querier), partial(weight_by_bank, net, bank)


@torch.inference_mode()
def prototype_bank(stage: Stage, teacher: nn.Module, labeled: Sequence[Sample]) -> Tensor:
    """Average the teacher's features over every class of every labeled image: (labeled, C, D)."""
    num_classes = len(describe(stage.config.dataset).classes)
    rows = []
    title = f"{stage.name} prototypes"
    for _, batch in whole_batches(labeled, stage.config, stage.device, title):
        with stage.device.autocast():
            features = teacher.extract(batch.image)
        rows.append(class_prototypes(features, batch.label, num_classes)[0])
    return torch.cat(rows)


def _repeat(config: Config, splits: Splits) -> int:
    """How often stage 1 passes the labeled list an epoch."""
    return 2 if len(splits.labeled) < config.supervised.repeat_below else 1


def _refuse_large_batches(config: Config, splits: Splits) -> None:
    labeled = len(splits.labeled) * _repeat(config, splits)
    reliable = count_kept(len(splits.unlabeled), config.select.keep)
    for key, size, samples in (
        ("supervised", config.supervised.batch_size, labeled),
        ("retrain", config.retrain.batch_size, reliable),
    ):
        if size > samples:
            raise UserError(
                f"{key}.batch_size: {size} is larger than the {samples} samples of an epoch; "
                "lower it"
            )


def _querier(config: Config, splits: Splits, index: QueryIndex, read: SampleReader) -> Querier:
    rule = QueryRule.of(config.query, describe(config.dataset))
    return Querier(splits.labeled, index, rule, config.augment, read)


def _labeled_loss(config: Config) -> LabeledLoss:
    if config.ohem is None:
        return cross_entropy
    return partial(ohem_cross_entropy, **config.ohem.model_dump())


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", required=True, help="a YAML file, here or in configs/")
    parser.add_argument(
        "settings", nargs="*", metavar="key=value", help="such as retrain.epochs=40"
    )
    parser.add_argument("--from-stage", type=int, choices=range(1, 7), help="do it and later again")
    arguments = parser.parse_intermixed_args()
    train(read_config(arguments.config, arguments.settings), arguments.from_stage)


if __name__ == "__main__":
    exit_with_one_line(main)
