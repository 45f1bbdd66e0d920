"""The training loop: an objective's loss, step by step, with exact resume and validation.

``train.py`` says what stages train on and which objective each has.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from dataset.catalog import dataset_info
from dataset.lists import Sample
from dataset.loader import RandomStreams, batch_keys, training_batches, whole_images
from dataset.training import parts
from model.cisc.anchors import EARLIER
from model.cisc.students import ClassPixels
from utils.config.batches import count_iterations
from utils.config.schema import TrainingSection
from utils.device import Device
from utils.distributed import averaging, broadcast_buffers, parallel, rank
from utils.evaluation import ConfusionMatrix, Predictor, validate
from utils.optimization import Optimization
from utils.progress import StageBar
from utils.run.resume import Progress
from utils.run.stages import Report, Stage
from utils.scores import group_images


class Loss(NamedTuple):
    """Total loss and logged terms of a part of a batch; the parts add up to the batch's."""

    total: Tensor
    terms: dict[str, Tensor]


class Crops(NamedTuple):
    """Images that pass networks in an iteration, over all processes."""

    labeled: int  # ... the student
    unlabeled: int  # ... the student
    teacher: int = 0  # ... the frozen teacher and the running average


class Objective(Protocol):
    """What a training stage does to a batch.

    Attributes:
        loss: total loss and logged terms of the network, a part of a batch, and the batch.
        seen: counts the pixels of each class; kept with the checkpoint, and resumed.
        average: a network like the student that becomes its running average, and is validated and
            kept in its place; None for none.
    """

    loss: Callable[[nn.Module, Any, Any], Loss]
    seen: ClassPixels
    average: nn.Module | None

    def prepare(self, batch: Any) -> Any:
        """Make of a batch as it was read, without gradients, what the loss takes. Collective."""

    def crops(self, batch_size: int) -> Crops:
        """Return what passes networks in an iteration."""

    def draw(self, net: nn.Module, epoch: int, iteration: int) -> None:
        """Draw what the network does after so many epochs and iterations."""


class StepResult(NamedTuple):
    """Result of a training step."""

    terms: dict[str, Tensor]  # this process's part of the logged terms
    not_finite: (
        float | None
    )  # the loss, where it or the gradient is not finite: nothing was updated


@dataclass(frozen=True)
class TrainingStep:
    """Updates the weights once by the objective of a batch.

    Attributes:
        student: from ``parallel``.
        objective: prepares batches and has their loss.
        optimization: of the student.
        device: its precision; batches are there.
        count: parts of a batch that pass one after another; batch norm sees one at a time.
    """

    student: nn.Module
    objective: Objective
    optimization: Optimization
    device: Device
    count: int = 1

    def __call__(self, batch: Any, seed: int) -> StepResult:
        """Take a record of tensors, and the seed of dropout and mixing."""
        torch.manual_seed(seed)
        terms: dict[str, Any] = {}
        with torch.no_grad(), self.device.autocast():
            batch = self.objective.prepare(batch)
        for number, part in enumerate(parts(batch, self.count), start=1):
            with averaging(self.student, last=number == self.count):
                with self.device.autocast():
                    loss = self.objective.loss(self.student, part, batch)
                self.optimization.backward(loss.total)
            for name, value in loss.terms.items():
                terms[name] = terms.get(name, 0.0) + value.detach()
        return StepResult(terms, self.optimization.step())


class TrainingData(NamedTuple):
    """The images of a training stage."""

    samples: Dataset  # by ``SampleKey``
    val: Sequence[Sample]  # to validate on


def fit(
    stage: Stage,
    net: nn.Module,
    objective: Objective,
    data: TrainingData,
    settings: TrainingSection,
) -> Report:
    """Train a network, write ``checkpoint.pth``; continue where an earlier run was stopped.

    Args:
        stage: where it works; its config and device. Stage 1 of ST++ writes ``earlier_1.pth`` and
            so on, after ``EARLIER`` shares of the stage.
        net: on the device; it is changed in place.
        objective: what is done to a batch.
        data: what the batches are made of, and what is validated on.
        settings: length and batch size of the stage.

    Returns:
        Last means of the logged terms, mIoU and IoU by class of the kept checkpoint, the best
        mIoU of an epoch that was validated, and iterations: as planned, or fewer where
        ``evaluate.patience`` ended the stage.

    Raises:
        UserError: the loss or the gradient of a batch is not finite.
    """
    config, device, size = stage.config, stage.device, settings.batch_size
    streams, steps = RandomStreams(config.seed, stage.name), len(data.samples) // size  # an epoch
    iterations = count_iterations(settings, len(data.samples))
    epochs = math.ceil(iterations / steps)  # the last one may be shorter
    average, seen = objective.average, objective.seen.to(device.torch_device)
    optimization = Optimization(
        net, config.optimizer, iterations, device.scaler(), average, config.retrain.average_decay
    )
    kept = net if average is None else average
    step_of = TrainingStep(parallel(net), objective, optimization, device, settings.accumulate)
    _say_if_patience_is_idle(stage, epochs)
    stable = config.select.score == "stability" and stage.name.startswith("1")
    earlier = [math.ceil(epochs * share) for share in EARLIER if stable]
    classes, best = dataset_info(config.dataset).classes, config.evaluate.checkpoint == "best"
    crops = objective.crops(size)
    bar = StageBar(stage.name, iterations, steps, crops.labeled + crops.unlabeled)
    with bar, Progress(stage, net, optimization, bar, seen) as at:
        outcome = at.report
        left = range(at.epoch, at.epoch if "iterations" in outcome else epochs)
        batches = training_batches(data.samples, size, left, streams, config.workers, at.step)
        for epoch in left:
            net.train()
            bar.start(epoch, at.seen)
            for step in range(at.step, min(steps, iterations - epoch * steps)):
                batch, rate = device.move(next(batches)), optimization.lr
                result = step_of(batch, streams.torch_seed(epoch, step, rank()))
                if result.not_finite is not None:
                    keys = batch_keys(len(data.samples), size, epoch, step, streams)
                    names = data.samples.names(keys)
                    stage.refuse_not_finite(epoch, step, result.not_finite, names)
                bar.update(result.terms, rate)
                at.step_done()
            broadcast_buffers(net, kept)  # what is validated is what rank 0 saves and draws
            numbers, last, ious = bar.means(), epoch + 1 == epochs, {}
            passed = min((epoch + 1) * steps, iterations)
            if last or (epoch + 1) % config.evaluate.every == 0:
                matrix = _validate(stage, kept, data.val)
                scores = matrix.report(classes)
                numbers, ious = {**numbers, **_means(scores)}, scores["per_class_iou"]
                outcome = _with_best(outcome, numbers["miou"], epoch + 1)
                since_best = epoch + 1 - outcome.get("best_epoch", 0)
                last = last or config.evaluate.ends(since_best)
                counts = since_best == 0 if best else last
                if counts:
                    outcome = {**outcome, **numbers, **scores, "epoch": epoch + 1}
                    stage.save(kept, epoch + 1, seen.learnt())
            for number in (n for n, end in enumerate(earlier, 1) if end == epoch + 1):
                stage.save(kept, epoch + 1, seen.learnt(), f"earlier_{number}.pth")
            if last or (epoch + 1) % config.panels.every == 0:
                objective.draw(kept, epoch + 1, passed)
            stage.record(epoch + 1, numbers, passed, ious)
            at.epoch_done({**outcome, "iterations": passed} if last else outcome)
            if last:
                break
    outcome = {"iterations": iterations, **at.report, "planned_iterations": iterations}
    if outcome["iterations"] < iterations:
        waited = config.evaluate.patience
        stage.log.say(
            f"{stage.name}: stopped after epoch {at.epoch} of {epochs}: no better mIoU on val in "
            f"{waited} validation{'s' if waited > 1 else ''}"
        )
    counts = {f"{kind}_crops": n * outcome["iterations"] for kind, n in crops._asdict().items()}
    return {**outcome, **counts}


def _with_best(outcome: Report, miou: float, epoch: int) -> Report:
    """Add the best mIoU of the validations so far, and its epoch, counted from 1."""
    if miou > outcome.get("best_miou", -1.0):
        return {**outcome, "best_miou": miou, "best_epoch": epoch}
    return outcome


def _say_if_patience_is_idle(stage: Stage, epochs: int) -> None:
    patience, every = stage.config.evaluate.patience, stage.config.evaluate.every
    if patience is not None and (patience + 1) * every >= epochs:
        stage.log.say(
            f"{stage.name}: evaluate.patience={patience} cannot end this stage early: it has "
            f"{epochs} epochs and evaluate.every={every}; lower one of the two"
        )


def _means(scores: Report) -> dict[str, float]:
    """Return what an epoch's line shows of a matrix's report."""
    by_group = {"dice_by_group": scores["by_group"]["dice"]} if "by_group" in scores else {}
    return {"miou": scores["miou"], **by_group}


def _validate(stage: Stage, net: nn.Module, val: Sequence[Sample]) -> ConfusionMatrix:
    """Compare a network's predictions with the labels of a list. Collective."""
    loader = whole_images(stage.config, val, net.preprocessing)
    predict = Predictor(net.eval(), stage.device, stage.config.inference)
    groups = group_images([sample.name for sample in val], stage.config.dataset.groups)
    classes = len(dataset_info(stage.config.dataset).classes)
    return validate(predict, loader, classes, groups=groups)
