"""Train a segmentation network on few labels and many images: the six stages of CISC-R.

python train.py --config pascal.yaml [--method NAME] [section.key=value ...]
    [--from-stage N | --fresh NAME]
"""

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dataset.cache import sample_reader
from dataset.catalog import describe
from dataset.lists import Sample, SampleReader, Splits, mask_file, read_splits, with_pseudo_masks
from dataset.loader import Chance, batch_keys, training_batches, whole_images
from dataset.query import (
    Querier,
    QueryIndex,
    QueryRule,
    build_query_index,
    read_selection,
    write_csv,
    write_selection,
)
from dataset.training import (
    LabeledPairs,
    QueryPair,
    RetrainSample,
    RetrainSamples,
    parts,
    queried_image,
    queried_prototype,
    refuse_batch_sizes,
    repeats,
)
from model import network_of, refuse_crop
from model.cisc import (
    anchor_weight,
    class_prototypes,
    class_region,
    consistency_loss,
    cross_image_weight,
    image_reliability,
    masked_average_pooling,
    reliability,
)
from model.losses import cross_entropy, ohem_cross_entropy, rectified_cross_entropy
from model.ops.frozen import frozen
from utils import IGNORE, Preprocessing
from utils.checkpoint import load_weights
from utils.config.reading import METHODS, read_config
from utils.config.schema import Config, OhemSection, TrainingSection
from utils.device import Device
from utils.distributed import (
    averaging,
    broadcast,
    by_first,
    counted,
    gathered,
    joined,
    merged,
    parallel,
    rank,
)
from utils.errors import Parser, UserError, exit_with_one_line
from utils.evaluation import Predictor, base_size, passes, resize_images, validate
from utils.optimization import Optimization
from utils.panels import draw_examples, save_mask
from utils.progress import StageBar
from utils.run.resume import Journal, Progress
from utils.run.stages import Report, Run, Stage, checkpoint_of

EXAMPLES = 4  # validation images in a run's picture
LabeledLoss = Callable[..., Tensor]  # of logits, labels and the valid pixels of the batch
# Weight of the pixels of pseudo labels: of the teacher, samples, and the labels' confidence.
Weigh = Callable[[nn.Module, RetrainSample, Tensor | None], Tensor]


class Loss(NamedTuple):
    """Total loss and logged terms of a part of a batch; the parts add up to the batch's."""

    total: Tensor
    terms: dict[str, Tensor]


Objective = Callable[[nn.Module, Any, Any], Loss]  # of the student, a part of a batch, the batch


def train(config: Config, from_stage: int | None = None, fresh: bool = False) -> None:
    """Run the six stages, or those that are left of them."""
    kind, splits = describe(config.dataset), read_splits(config.dataset)
    refuse_batch_sizes(config, splits)
    refuse_crop(config.model.backbone, config.augment.crop_size)
    index = build_query_index(splits.labeled, QueryRule.of(config.query, kind))
    with Run(config, from_stage, fresh, splits.digests()) as run:
        first = final = run.stage("1_supervised", train_supervised, splits, index)
        teacher, pseudo_labeled = first, splits.unlabeled
        if 2 in config.stages:
            masks = run.stage("2_pseudo_label", write_pseudo_labels, first, splits.unlabeled)
            pseudo_labeled = with_pseudo_masks(splits.unlabeled, masks / "masks")
        if 3 in config.stages:
            chosen = run.stage("3_select", select, first, splits, pseudo_labeled, index)
            reliable, unreliable, index = read_selection(chosen, splits.unlabeled, kind.classes)
            pseudo_labeled = with_pseudo_masks(reliable, masks / "masks")
            teacher = run.stage("4_retrain", retrain, splits, pseudo_labeled, first, index)
            masks = run.stage("5_relabel", write_pseudo_labels, teacher, unreliable)
            pseudo_labeled += with_pseudo_masks(unreliable, masks / "masks")
        if 6 in config.stages:
            final = run.stage("6_retrain", retrain, splits, pseudo_labeled, teacher, index)
        _draw(run, splits.val, first, final)
        run.finish()


def train_supervised(stage: Stage, splits: Splits, index: QueryIndex) -> Report:
    """Stage 1: labeled pairs, cross entropy on both images and the consistency loss."""
    config, chance = stage.config, Chance(stage.config.seed, stage.name)
    net = _new_network(stage, chance)
    read = sample_reader(config.cache, splits.labeled, config.workers)
    querier = _querier(config, splits, index, read)
    repeat = repeats(config.supervised, splits.labeled)
    pairs = LabeledPairs(
        splits.labeled,
        querier,
        config.augment,
        chance,
        repeat,
        read,
        preprocessing=net.preprocessing,
    )
    objective = partial(
        supervised_objective,
        labeled_loss=_labeled_loss(config.ohem),
        consistency=config.supervised.consistency,
    )
    return fit(stage, net, objective, pairs, config.supervised, splits.val)


def supervised_objective(
    net: nn.Module,
    pair: QueryPair,
    batch: QueryPair,
    labeled_loss: LabeledLoss,
    consistency: float,
) -> Loss:
    """Cross entropy of both images of each pair, and the consistency loss between them.

    Args:
        net: the student; both images pass it as one batch.
        pair: the batch of pairs, or a part of it.
        batch: all of this process's batch.
        labeled_loss: cross entropy of logits and true labels.
        consistency: weight of the consistency loss; 0 leaves it out.

    Source: docs/method.md, sections 3 and 9.
    """
    pixels, query_pixels, pairs = counted(
        batch.label != IGNORE, batch.query_label != IGNORE, batch.shared_class != IGNORE
    )
    output = net(torch.cat([pair.image, pair.query_image]))
    logits, query_logits = output.logits.chunk(2)
    features, query_features = output.features.chunk(2)
    entropy = labeled_loss(logits, pair.label, pixels)
    entropy = entropy + labeled_loss(query_logits, pair.query_label, query_pixels)
    if consistency == 0:
        return Loss(entropy, {"ce": entropy})
    consistent = consistency_loss(
        features, query_features, pair.label, pair.query_label, pair.shared_class, pairs
    )
    return Loss(entropy + consistency * consistent, {"ce": entropy, "consistency": consistent})


@torch.inference_mode()
def write_pseudo_labels(stage: Stage, teacher: Path, unlabeled: Sequence[Sample]) -> Report:
    """Stages 2 and 5: the teacher's most probable class of every pixel, as palette PNGs."""
    config, palette = stage.config, describe(stage.config.dataset).palette()
    net = _teacher(stage, teacher)
    predict = Predictor(net, stage.device, config.inference, config.pseudo_label)
    journal = Journal(stage)
    done = broadcast(journal.read)
    loader = whole_images(
        unlabeled,
        config.inference,
        config.workers,
        done=frozenset(done),
        preprocessing=net.preprocessing,
    )

    def keep(samples: Sequence[Sample], masks: Any, means: Sequence[float]) -> dict[str, float]:
        files = [mask_file(stage.folder / "masks", sample) for sample in samples]
        for file, mask in zip(files, masks, strict=True):
            save_mask(file, mask, palette)
        return journal.add([sample.name for sample in samples], files, means)

    with ThreadPoolExecutor(1) as writer:  # a batch is written while the next one is predicted
        kept = []
        for batch in passes(loader, stage.device, stage.name):
            probabilities, ids = predict(batch.image, tuple(batch.label.shape[-2:])).max(dim=1)
            chosen = [unlabeled[index] for index in batch.index.tolist()]
            means = probabilities.mean(dim=(1, 2)).tolist()
            kept.append(writer.submit(keep, chosen, ids.byte().cpu().numpy(), means))
            if len(kept) > 1:
                kept[-2].result()  # a full disk ends the stage now
    done |= merged([batch.result() for batch in kept])
    confidences = {sample.name: done[sample.name] for sample in unlabeled}
    table = ("image", "confidence"), confidences.items()
    by_first(write_csv)(stage.folder / "confidence.csv", *table)
    mean = sum(confidences.values()) / max(1, len(confidences))
    return {"images": len(confidences), "confidence": mean}


@torch.inference_mode()
def select(
    stage: Stage,
    teacher: Path,
    splits: Splits,
    pseudo_labeled: Sequence[Sample],
    index: QueryIndex,
) -> Report:
    """Stage 3: which pseudo labels, and which labeled images of each class, are reliable."""
    settings, classes = stage.config.select, describe(stage.config.dataset).classes
    net = _teacher(stage, teacher)
    anchors = class_anchors(stage, net, splits.labeled)

    def scored(samples: Sequence[Sample], title: str) -> Iterator[tuple[list[str], Tensor]]:
        for names, features, label in _features(stage, net, samples, title):
            yield names, reliability(features, label, anchors)

    partners: list[dict[tuple[int, str], float]] = []  # of each batch, as are images
    for names, scores in scored(splits.labeled, "labeled"):
        rows = zip(names, scores.tolist(), strict=True)
        found = {(c, name): score for name, row in rows for c, score in enumerate(row)}
        partners.append({key: score for key, score in found.items() if math.isfinite(score)})
    images: list[dict[str, float]] = []
    for names, scores in scored(pseudo_labeled, "unlabeled"):
        ranked = image_reliability(scores, settings.score == "mean").tolist()
        images.append(dict(zip(names, ranked, strict=True)))
    by_name = merged(images)
    both = {sample.name: by_name[sample.name] for sample in splits.unlabeled}, merged(partners)
    reliable = broadcast(write_selection, stage.folder, *both, index, settings.keep, classes)
    return {"images": reliable}


def retrain(
    stage: Stage,
    splits: Splits,
    pseudo_labeled: Sequence[Sample],
    teacher: Path,
    index: QueryIndex,
) -> Report:
    """Stages 4 and 6: a student on labeled and pseudo-labeled images."""
    config, settings = stage.config, stage.config.retrain
    chance = Chance(config.seed, stage.name)
    net, frozen_teacher = _new_network(stage, chance), _teacher(stage, teacher)
    if settings.start == "teacher":
        load_weights(net, checkpoint_of(teacher))
    average = deepcopy(net).requires_grad_(False) if settings.labels == "average" else None
    labeled_loss, preprocessing = _labeled_loss(config.ohem), net.preprocessing
    read = sample_reader(config.cache, [*pseudo_labeled, *splits.labeled], config.workers)
    querier = _querier(config, splits, index, read)
    query, weigh = _weighting(stage, frozen_teacher, splits.labeled, querier, preprocessing)
    samples = RetrainSamples(
        pseudo_labeled,
        splits.labeled,
        query,
        config.augment,
        chance,
        settings.teacher_view == "strong",
        read,
        preprocessing=preprocessing,
    )

    def objective(student: nn.Module, samples: RetrainSample, batch: RetrainSample) -> Loss:
        with torch.no_grad():
            confidence = None
            if average is not None:
                samples, confidence = predicted_labels(average, samples)
            elif settings.threshold or settings.weight.startswith("confidence"):
                confidence = label_confidence(frozen_teacher, samples)
            weight = weigh(frozen_teacher, samples, confidence)
            if settings.threshold:
                weight = weight * (confidence >= settings.threshold)
            if settings.mix == "unlabeled":
                samples, weight = cut_mix(samples, weight)
        return retrain_objective(student, samples, batch, weight, labeled_loss)

    outcome = fit(stage, net, objective, samples, settings, splits.val, average)
    return {"images": len(samples), **outcome}


def predicted_labels(average: nn.Module, samples: RetrainSample) -> tuple[RetrainSample, Tensor]:
    """Label the weak views by the running average: samples with labels, and (B, H, W) confidence.

    Source: mean teacher (Tarvainen and Valpola, NeurIPS 2017), FixMatch (Sohn et al., NeurIPS
    2020).
    """
    average.eval()
    confidence, ids = average(samples.image).logits.softmax(dim=1).max(dim=1)
    labels = ids.where(samples.pseudo_label != IGNORE, IGNORE)  # padding stays ignored
    return samples._replace(pseudo_label=labels), confidence


def label_confidence(teacher: nn.Module, samples: RetrainSample) -> Tensor:
    """Return the teacher's probability of each stored label, (B, H, W); 0 where it is ignored."""
    probability = teacher(samples.image).logits.softmax(dim=1)
    valid = samples.pseudo_label != IGNORE
    chosen = probability.gather(1, samples.pseudo_label.where(valid, 0).unsqueeze(1)).squeeze(1)
    return chosen * valid


def cut_mix(samples: RetrainSample, weight: Tensor) -> tuple[RetrainSample, Tensor]:
    """Paste a random box of each student image, with labels and weights, into the one before it.

    Box: with probability 1/2 an area of U(0.02, 0.4) of the image and an aspect ratio of
    U(0.3, 1 / 0.3), cut at the edges. Random numbers are torch's, of the CPU.

    Source: CutMix (Yun et al., ICCV 2019); the box as in UniMatch's description.
    """
    height, width = weight.shape[-2:]
    boxes = torch.zeros(weight.shape, dtype=torch.bool)
    for box in boxes:
        chance, share, ratio, y, x = torch.rand(5).tolist()
        area, aspect = (0.02 + 0.38 * share) * height * width, 0.3 + (1 / 0.3 - 0.3) * ratio
        rows, columns = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        top, left = int(y * max(1, height - rows)), int(x * max(1, width - columns))
        box[top : top + rows, left : left + columns] = chance < 0.5
    boxes = boxes.to(weight.device)
    image, label = samples.student_image, samples.pseudo_label
    mixed = samples._replace(
        student_image=torch.where(boxes.unsqueeze(1), image.roll(-1, dims=0), image),
        pseudo_label=torch.where(boxes, label.roll(-1, dims=0), label),
    )
    return mixed, torch.where(boxes, weight.roll(-1, dims=0), weight)


def retrain_objective(
    net: nn.Module,
    samples: RetrainSample,
    batch: RetrainSample,
    weight: Tensor,
    labeled_loss: LabeledLoss,
) -> Loss:
    """Rectified cross entropy of unlabeled images, and cross entropy of labeled ones.

    Args:
        net: the student; both kinds of images pass it as one batch.
        samples: the batch of samples, or a part of it.
        batch: all of this process's batch.
        weight: (B, H, W) float in [0, 1], of the pixels of the samples' pseudo labels.
        labeled_loss: cross entropy of logits and true labels.

    Source: docs/method.md, sections 4 and 9.
    """
    everyone = batch.queried.shared_class
    pixels, labeled_pixels, images = counted(
        batch.pseudo_label != IGNORE, batch.labeled_label != IGNORE, torch.ones_like(everyone)
    )
    logits = net(torch.cat([samples.student_image, samples.labeled_image])).logits
    student_logits, labeled_logits = logits.chunk(2)
    unlabeled = rectified_cross_entropy(student_logits, samples.pseudo_label, weight, pixels)
    labeled = labeled_loss(labeled_logits, samples.labeled_label, labeled_pixels)
    terms = {
        "unlabeled": unlabeled,
        "labeled": labeled,
        "weight": (weight * (samples.pseudo_label != IGNORE)).sum() / pixels.clamp_min(1),
        "queried": (samples.queried.shared_class != IGNORE).sum() / images,
    }
    return Loss(unlabeled + labeled, terms)


def weight_one(_: nn.Module, samples: RetrainSample, __: Tensor | None) -> Tensor:
    """Weigh every pixel 1: plain self-training."""
    return torch.ones_like(samples.pseudo_label, dtype=torch.float32)


def weight_by_confidence(_: nn.Module, __: RetrainSample, confidence: Tensor) -> Tensor:
    """Weigh pixels by the probability of their pseudo label."""
    return confidence


def weight_by_image(teacher: nn.Module, samples: RetrainSample, _: Tensor | None) -> Tensor:
    """Weigh pseudo labels by the queried images, which pass the teacher in the same batch.

    Args:
        teacher: frozen.
        samples: their ``queried`` are ``QueriedImage``.

    Returns:
        (B, H, W) float32 in [0, 1].
    """
    queried = samples.queried
    features = teacher.extract(torch.cat([samples.image, queried.image]))
    features, query_features = features.chunk(2)
    region = class_region(queried.label, queried.shared_class)
    prototype = masked_average_pooling(query_features, region)
    return cross_image_weight(features, prototype, samples.pseudo_label, queried.shared_class)


def weight_by_bank(
    teacher: nn.Module, samples: RetrainSample, _: Tensor | None, bank: Tensor
) -> Tensor:
    """Weigh pseudo labels by stored prototypes of whole labeled images.

    Args:
        teacher: frozen.
        samples: their ``queried`` are ``QueriedPrototype``.
        bank: (labeled images, C, D) float32, the teacher's prototypes.

    Returns:
        (B, H, W) float32 in [0, 1].
    """
    queried = samples.queried
    some_class = queried.shared_class.clamp_max(bank.shape[1] - 1)  # 255 has weight 1 anyway
    prototype = bank[queried.position, some_class]
    features = teacher.extract(samples.image)
    return cross_image_weight(features, prototype, samples.pseudo_label, queried.shared_class)


def weight_by_anchors(
    teacher: nn.Module,
    samples: RetrainSample,
    confidence: Tensor | None,
    anchors: Tensor,
    confident: bool = False,
) -> Tensor:
    """Weigh pixels by the similarity to their class's anchor, times their confidence or not.

    Args:
        teacher: frozen.
        samples: their pseudo labels are weighed.
        confidence: (B, H, W) float, the probability of the pseudo labels.
        anchors: (C, D) float32, the teacher's.
        confident: multiply by the confidence.
    """
    weight = anchor_weight(teacher.extract(samples.image), samples.pseudo_label, anchors)
    return weight * confidence if confident else weight


def training_step(
    student: nn.Module,
    objective: Objective,
    optimization: Optimization,
    device: Device,
    batch: Any,
    seed: int,
    count: int = 1,
) -> tuple[dict[str, Tensor], float | None]:
    """Update the weights once by the objective of a batch.

    Args:
        student: from ``parallel``.
        objective: of the network, a part of a batch, and the batch.
        optimization: of the student.
        device: its precision; the batch is there.
        batch: a record of tensors.
        seed: of dropout.
        count: parts that pass one after another; batch norm sees one at a time.

    Returns:
        This process's part of the logged terms; and None, or the loss where it or the gradient is
        not finite: then nothing was updated.
    """
    torch.manual_seed(seed)
    terms: dict[str, Any] = {}
    for number, part in enumerate(parts(batch, count), start=1):
        with averaging(student, last=number == count):
            with device.autocast():
                loss = objective(student, part, batch)
            optimization.backward(loss.total)
        for name, value in loss.terms.items():
            terms[name] = terms.get(name, 0.0) + value.detach()
    return terms, optimization.step()


def fit(
    stage: Stage,
    net: nn.Module,
    objective: Objective,
    dataset: LabeledPairs | RetrainSamples,
    settings: TrainingSection,
    val: Sequence[Sample],
    average: nn.Module | None = None,
) -> Report:
    """Train a network, write ``checkpoint.pth``; continue where an earlier run was stopped.

    Args:
        stage: where it works; its config and device.
        net: on the device; it is changed in place.
        objective: of the network, a part of a batch, and the batch.
        dataset: what the batches are made of.
        settings: length and batch size of the stage.
        val: images to validate on.
        average: like the network; becomes its running average, and is validated and kept.

    Returns:
        Last means of the logged terms, mIoU and IoU by class of the kept checkpoint.

    Raises:
        UserError: the loss or the gradient of a batch is not finite.
    """
    config, device, size = stage.config, stage.device, settings.batch_size
    chance, steps = Chance(config.seed, stage.name), len(dataset) // size  # steps an epoch
    iterations = settings.iterations or steps * settings.epochs
    count = math.ceil(iterations / steps)  # epochs; the last one may be shorter
    decay = config.retrain.average_decay
    optimization = Optimization(net, config.optimizer, iterations, device.scaler(), average, decay)
    kept = net if average is None else average
    student, classes = parallel(net), describe(config.dataset).classes
    best = config.evaluate.checkpoint == "best"
    bar = StageBar(stage.name, iterations, steps, images=2 * size)
    with bar, Progress(stage, net, optimization, bar) as at:
        epochs, outcome = range(at.epoch, count), at.report
        batches = training_batches(dataset, size, epochs, chance, config.workers, at.step)
        for epoch in epochs:
            net.train()
            bar.start(epoch, at.seen)
            for step in range(at.step, min(steps, iterations - epoch * steps)):
                batch, rate = device.move(next(batches)), optimization.lr
                seed = chance.torch_seed(epoch, step, rank())
                terms, spoilt = training_step(
                    student, objective, optimization, device, batch, seed, settings.accumulate
                )
                if spoilt is not None:
                    keys = batch_keys(len(dataset), size, epoch, step, chance)
                    stage.refuse_not_finite(epoch, step, spoilt, dataset.names(keys))
                bar.update(terms, rate)
                at.step_done()
            numbers, last = bar.means(), epoch + 1 == count
            if last or (epoch + 1) % config.evaluate.every == 0:
                loader = _whole(config, val, net.preprocessing)
                predict = Predictor(frozen(kept, device), device, config.inference)
                matrix = validate(predict, loader, len(classes))
                numbers["miou"] = matrix.mean_iou()
                if numbers["miou"] > outcome.get("miou", -1.0) if best else last:
                    outcome = {**numbers, **matrix.report(classes), "epoch": epoch + 1}
                    stage.save(kept, epoch + 1)
            stage.record(epoch + 1, numbers)
            at.epoch_done(outcome)
    labeled = 2 * size if isinstance(dataset, LabeledPairs) else size  # crops an iteration
    crops = {"labeled_crops": labeled, "unlabeled_crops": 2 * size - labeled}
    return {**outcome, "iterations": iterations, **{k: n * iterations for k, n in crops.items()}}


def _weighting(
    stage: Stage,
    teacher: nn.Module,
    labeled: Sequence[Sample],
    querier: Querier,
    preprocessing: Preprocessing,
) -> tuple[Callable[..., Any], Weigh]:
    """Return what is queried for each unlabeled image, and the rule that weighs its pixels."""
    rule, query = stage.config.retrain.weight, partial(queried_prototype, querier)
    if rule == "image":
        return partial(queried_image, querier, preprocessing=preprocessing), weight_by_image
    if rule == "bank":
        bank = prototype_bank(stage, teacher, labeled)
        return query, partial(weight_by_bank, bank=bank)
    if rule.endswith("anchors"):
        anchors = class_anchors(stage, teacher, labeled)
        confident = rule == "confidence_anchors"
        return query, partial(weight_by_anchors, anchors=anchors, confident=confident)
    return query, weight_one if rule == "ones" else weight_by_confidence


@torch.inference_mode()
def class_anchors(stage: Stage, net: nn.Module, labeled: Sequence[Sample]) -> Tensor:
    """Average the prototypes of each class over the labeled images that show it: (C, D) float32.

    NaN for a class that no label shows. Source: docs/method.md, section 7.
    """
    sums = [  # of each batch, (C, D + 1): prototypes, and how many images have one
        torch.cat([prototypes, present.unsqueeze(2)], dim=2).sum(dim=0).cpu()
        for _, prototypes, present in _prototypes(stage, net, labeled, "anchors")
    ]
    summed = torch.stack(gathered(sums)).sum(dim=0).to(stage.device.torch_device)
    return summed[:, :-1] / summed[:, -1:]


@torch.inference_mode()
def prototype_bank(stage: Stage, teacher: nn.Module, labeled: Sequence[Sample]) -> Tensor:
    """Average the teacher's features over every class of every labeled image: (labeled, C, D)."""
    rows: list[dict[str, Tensor]] = []  # of each batch
    for names, prototypes, _ in _prototypes(stage, teacher, labeled, "prototypes"):
        rows.append(dict(zip(names, prototypes.cpu(), strict=True)))
    bank = merged(rows)
    return torch.stack([bank[sample.name] for sample in labeled]).to(stage.device.torch_device)


def _prototypes(
    stage: Stage, net: nn.Module, samples: Sequence[Sample], title: str
) -> Iterator[tuple[list[str], Tensor, Tensor]]:
    """Yield names, class prototypes (B, C, D) and which of them are present (B, C), by batch."""
    num_classes = len(describe(stage.config.dataset).classes)
    for names, features, label in _features(stage, net, samples, title):
        yield names, *class_prototypes(features, label, num_classes)


def _features(
    stage: Stage, net: nn.Module, samples: Sequence[Sample], title: str
) -> Iterator[tuple[list[str], Tensor, Tensor]]:
    """Pass whole images through a network; yield names, features and labels by batch."""
    loader, preprocessing = _whole(stage.config, samples, net.preprocessing), net.preprocessing
    for batch in passes(loader, stage.device, f"{stage.name} {title}"):
        size = base_size(batch.image.shape[-2:], stage.config.inference.long_side)
        with stage.device.autocast():
            features = net.extract(resize_images(batch.image, size, preprocessing.interpolation))
        yield [samples[index].name for index in batch.index.tolist()], features, batch.label


def _whole(config: Config, samples: Sequence[Sample], preprocessing: Preprocessing) -> Any:
    return whole_images(samples, config.inference, config.workers, preprocessing=preprocessing)


def _new_network(stage: Stage, chance: Chance) -> nn.Module:
    """Build a network from the backbone's weights; the head is initialised at random."""
    torch.manual_seed(chance.torch_seed())
    settings, kind = stage.config.model, describe(stage.config.dataset)
    net = stage.device.place(network_of(settings, len(kind.classes), settings.pretrained))
    weights, images = net.pretrained_from or "initialised at random", net.preprocessing
    stage.log.say(f"{stage.name}: {settings.backbone}, {weights}, images {tuple(images)}")
    if settings.compile:
        net.compile(dynamic=False)
    return net


def _trained_network(config: Config, stage: Path) -> nn.Module:
    net = network_of(config.model, len(describe(config.dataset).classes), pretrained=None)
    load_weights(net, checkpoint_of(stage))
    return net


def _teacher(stage: Stage, folder: Path) -> nn.Module:
    """Load the network of a finished stage, frozen."""
    return frozen(_trained_network(stage.config, folder), stage.device)


def _labeled_loss(ohem: OhemSection | None) -> LabeledLoss:
    return cross_entropy if ohem is None else partial(ohem_cross_entropy, **ohem.model_dump())


def _querier(config: Config, splits: Splits, index: QueryIndex, read: SampleReader) -> Querier:
    rule = QueryRule.of(config.query, describe(config.dataset))
    return Querier(splits.labeled, index, rule, config.augment, read)


def _draw(run: Run, val: Sequence[Sample], *stages: Path) -> None:
    """Draw a few validation images, their labels and the predictions of stages."""
    chosen = val[:: max(1, len(val) // EXAMPLES)][:EXAMPLES]
    networks = {stage.name: _trained_network(run.config, stage) for stage in stages}
    predictors = {
        name: Predictor(frozen(net, run.device), run.device, run.config.inference)
        for name, net in networks.items()
    }
    path, kind = run.folder / "examples.png", describe(run.config.dataset)
    preprocessing = next(iter(networks.values())).preprocessing
    draw_examples(path, _whole(run.config, chosen, preprocessing), predictors, kind, preprocessing)


def main() -> None:
    """Read the command line and train; with ``torchrun``, as one of several processes."""
    # The same command gives the same bits; faster convolutions cost determinism.
    deterministic = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True)
    with joined(), deterministic:
        train(*read_arguments())


def read_arguments() -> tuple[Config, int | None, bool]:
    """Read the command line: settings, the stage to start from, whether to start over."""
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", required=True, help="a YAML file, here or in configs/")
    parser.add_argument("--method", choices=METHODS, help="settings of configs/methods/")
    parser.add_argument(
        "settings", nargs="*", metavar="key=value", help="such as retrain.epochs=40"
    )
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--from-stage", type=int, choices=range(1, 7), help="do it and later again")
    again.add_argument("--fresh", metavar="NAME", help="remove all that the run of this name made")
    arguments = parser.parse_intermixed_args()
    config = read_config(arguments.config, arguments.settings, arguments.method)
    if arguments.fresh not in (None, config.name):
        raise UserError(f"--fresh: this run is called '{config.name}', not '{arguments.fresh}'")
    return config, arguments.from_stage, arguments.fresh is not None


if __name__ == "__main__":
    exit_with_one_line(main)
