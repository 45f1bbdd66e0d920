"""Train a segmentation network on few labels and many images: the six stages of CISC-R.

python train.py --config pascal.yaml [--method NAME] [section.key=value ...]
    [--from-stage N | --fresh NAME] [--verify]
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dataset.cache import sample_reader
from dataset.catalog import describe
from dataset.lists import (
    Sample,
    SampleReader,
    Splits,
    mask_file,
    read_splits,
    read_truth,
    refuse_broken_images,
    with_pseudo_masks,
)
from dataset.loader import Chance, batch_keys, training_batches, whole_images
from dataset.predictions import draw_examples, keep_predictions
from dataset.query import (
    QueriedImage,
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
    planned_work,
    refuse_batch_sizes,
    repeats,
)
from model import largest_stride, network_of, refuse_crop
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
from model.mixing import View, cut_mix, cut_out, keep_whole, paste_queried
from model.ops.bilinear import resize
from model.ops.frozen import frozen
from model.ops.layers import full_size
from model.panels import QueryPanels
from model.retrieval import (
    LabeledPatches,
    calibrate,
    labeled_patches,
    neighbour_votes,
    pooled,
    sharpened,
)
from utils import IGNORE, Preprocessing
from utils.checkpoint import load_weights
from utils.config.reading import METHODS, read_config
from utils.config.schema import Config, OhemSection, RetrainSection, TrainingSection
from utils.device import Device
from utils.distributed import (
    averaging,
    broadcast,
    broadcast_buffers,
    by_first,
    counted,
    gathered,
    joined,
    merged,
    parallel,
    rank,
    reduced,
)
from utils.errors import Parser, UserError, exit_with_one_line
from utils.evaluation import ConfusionMatrix, Predictor, base_size, passes, resize_images, validate
from utils.optimization import Optimization
from utils.panels import save_mask
from utils.progress import StageBar
from utils.run.resume import Journal, Progress
from utils.run.stages import Report, Run, Stage, checkpoint_of

VOTERS, PATCHES = 512, 20_000  # labeled images and patches that vote on pseudo labels, at most
EARLIER = (1 / 3, 2 / 3)  # of stage 1: checkpoints that stability compares (ST++)
LabeledLoss = Callable[..., Tensor]  # of logits, labels and the valid pixels of the batch
# What the student's views of unlabeled images are mixed with.
MIXES = {"none": keep_whole, "cutout": cut_out, "unlabeled": cut_mix, "queried": paste_queried}


class Loss(NamedTuple):
    """Total loss and logged terms of a part of a batch; the parts add up to the batch's."""

    total: Tensor
    terms: dict[str, Tensor]


class Crops(NamedTuple):
    """Images that pass networks in an iteration, over all processes."""

    labeled: int  # ... the student
    unlabeled: int  # ... the student
    teacher: int = 0  # ... the frozen teacher and the running average


Objective = Callable[[nn.Module, Any, Any], Loss]  # of the student, a part of a batch, the batch
Prepare = Callable[[Any], Any]  # of a batch as it was read


def train(
    config: Config, from_stage: int | None = None, fresh: bool = False, verify: bool = False
) -> None:
    """Run the six stages, or those that are left of them."""
    kind, splits = describe(config.dataset), read_splits(config.dataset)
    truth = read_truth(config.dataset, config.panels.truth)  # is drawn, nothing else
    refuse_batch_sizes(config, splits)
    refuse_crop(config.model.backbone, config.augment.crop_size)
    index = build_query_index(splits.labeled, QueryRule.of(config.query, kind))
    run = Run(config, from_stage, fresh, splits.digests(), planned_work(config, splits), verify)
    if broadcast(lambda: run.is_new):  # else a truncated image could end a late stage
        broadcast(refuse_broken_images, splits)
    with run:
        first = final = run.stage("1_supervised", train_supervised, splits, index)
        teacher, pseudo_labeled = first, splits.unlabeled
        if 2 in config.stages:
            masks = run.stage(
                "2_pseudo_label", write_pseudo_labels, (first,), splits.unlabeled, splits.labeled
            )
            pseudo_labeled = with_pseudo_masks(splits.unlabeled, masks / "masks")
        if 3 in config.stages:
            chosen = run.stage("3_select", select, first, splits, pseudo_labeled, index)
            reliable, unreliable, index = read_selection(chosen, splits.unlabeled, kind.classes)
            pseudo_labeled = with_pseudo_masks(reliable, masks / "masks")
            teacher = run.stage("4_retrain", retrain, splits, pseudo_labeled, first, index, truth)
            teachers = (first, teacher) if config.relabel == "both" else (teacher,)
            masks = run.stage(
                "5_relabel", write_pseudo_labels, teachers, unreliable, splits.labeled
            )
            pseudo_labeled += with_pseudo_masks(unreliable, masks / "masks")
        if 6 in config.stages:
            final = run.stage("6_retrain", retrain, splits, pseudo_labeled, teacher, index, truth)
        run.finish()
        _keep_predictions(run, splits.val, first, final)


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
    crops = Crops(labeled=2 * config.supervised.batch_size, unlabeled=0)
    earlier = EARLIER if config.select.score == "stability" else ()
    return fit(stage, net, objective, pairs, config.supervised, splits.val, crops, earlier=earlier)


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
def write_pseudo_labels(
    stage: Stage, teachers: Sequence[Path], unlabeled: Sequence[Sample], labeled: Sequence[Sample]
) -> Report:
    """Stages 2 and 5: the most probable class of every pixel by teachers and votes, as PNGs."""
    config, palette = stage.config, describe(stage.config.dataset).palette()
    nets = [_teacher(stage, checkpoint_of(teacher)) for teacher in teachers]
    predictors = [Predictor(n, stage.device, config.inference, config.pseudo_label) for n in nets]
    ask = Neighbours(stage, labeled) if config.pseudo_label.neighbours else None
    journal = Journal(stage)
    done = broadcast(journal.read)
    loader = whole_images(
        unlabeled,
        config.inference,
        config.workers,
        done=frozenset(done),
        preprocessing=nets[0].preprocessing,
    )

    def keep(samples: Sequence[Sample], masks: Any, means: Sequence[float]) -> dict[str, float]:
        files = [mask_file(stage.folder / "masks", sample) for sample in samples]
        for file, mask in zip(files, masks, strict=True):
            save_mask(file, mask, palette, durable=False)  # the end of the stage waits for all
        return journal.add([sample.name for sample in samples], files, means)

    with ThreadPoolExecutor(1) as writer:  # a batch is written while the next one is predicted
        kept = []
        for batch in passes(loader, stage.device, stage.name):
            size = tuple(batch.label.shape[-2:])
            probabilities = sum(predict(batch.image, size) for predict in predictors) / len(nets)
            if ask is not None:
                votes, adjustment = ask.votes(batch.image, size), config.pseudo_label.adjustment
                probabilities = pooled(probabilities, votes, ask.prior, adjustment)
            probabilities, ids = probabilities.max(dim=1)
            ids = ids.where(probabilities >= config.pseudo_label.threshold, IGNORE)
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


class Neighbours:
    """Labeled patches in the features of the encoder as it was before training.

    Args:
        stage: its config and device; its log is told which of ``pseudo_label.neighbour_scales``
            fits the labeled images best.
        labeled: patches of at most ``VOTERS`` images, drawn at random, vote, ``PATCHES`` in all.

    Raises:
        UserError: no patch is labeled on more than half of its pixels.

    Source: docs/method.md, section 13.
    """

    def __init__(self, stage: Stage, labeled: Sequence[Sample]) -> None:
        self._stage, config, chance = stage, stage.config, Chance(stage.config.seed, "1_supervised")
        # The network with which stage 1 began, as its encoder was pretrained: not dilated.
        torch.manual_seed(chance.torch_seed())
        self._stride = largest_stride(config.model.backbone)
        model = config.model.model_copy(update={"output_stride": self._stride})
        classes = len(describe(config.dataset).classes)
        net = frozen(network_of(model, classes, config.model.pretrained), stage.device)
        self._encoder, self._preprocessing = net.backbone, net.preprocessing
        drawn = chance.of(0, 0, 0).permutation(len(labeled))[:VOTERS]
        labeled = [labeled[number] for number in sorted(drawn)]
        fits = []
        for scale in config.pseudo_label.neighbour_scales:
            patches = self._patches_of(labeled, scale, classes, chance)
            if len(patches.image):
                fits.append((broadcast(calibrate, patches), scale, patches))
        if not fits:
            raise UserError(
                "pseudo_label.neighbours: no patch of the labeled images is labeled on more than "
                "half of its pixels; set pseudo_label.neighbours=false"
            )
        fit, self._scale, self._patches = min(fits, key=lambda each: each[0].cross_entropy)
        self._exponent, self.prior = fit.exponent, self._patches.prior()
        if stage.log is not None:
            stage.log.say(
                f"{stage.name}: {len(self._patches.image)} labeled patches vote, images enlarged "
                f"{self._scale:g} times, exponent {fit.exponent:.1f}, cross entropy "
                f"{fit.cross_entropy:.3f} on labeled images left out"
            )

    def votes(self, images: Tensor, size: tuple[int, int]) -> Tensor:
        """Return probabilities of (B, 3, h, w) images, of their files' size: (B, C, H, W)."""
        votes = neighbour_votes(self._maps(images, self._scale), self._patches)
        return resize(sharpened(votes, self.prior, self._exponent), size)

    def _patches_of(
        self, labeled: Sequence[Sample], scale: float, classes: int, chance: Chance
    ) -> LabeledPatches:
        stage, found = self._stage, []
        loader = _whole(stage.config, labeled, self._preprocessing)
        for batch in passes(loader, stage.device, f"{stage.name} labeled"):
            limit = math.ceil(PATCHES * len(batch.index) / len(labeled))
            rng = chance.of(int(batch.index[0]))
            maps = self._maps(batch.image, scale)
            patches = labeled_patches(maps, batch.label, batch.index, classes, limit, rng)
            found.append([rows.cpu() for rows in patches])
        columns = map(torch.cat, zip(*gathered(found), strict=True))
        return LabeledPatches(*(rows.to(stage.device.torch_device) for rows in columns))

    def _maps(self, images: Tensor, scale: float) -> Tensor:
        base = base_size(images.shape[-2:], self._stage.config.inference.long_side)
        # Multiples of the stride: labels and votes then lie where the maps are.
        size = tuple(self._stride * math.ceil(side * scale / self._stride) for side in base)
        with self._stage.device.autocast():
            images = resize_images(images, size, self._preprocessing.interpolation)
            return self._encoder(images)[-1]


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
    net = _teacher(stage, checkpoint_of(teacher))
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
    if settings.score == "stability":
        images.extend(_stability(stage, teacher, pseudo_labeled))
    else:
        for names, scores in scored(pseudo_labeled, "unlabeled"):
            ranked = image_reliability(scores, settings.score == "mean").tolist()
            images.append(dict(zip(names, ranked, strict=True)))
    by_name = merged(images)
    both = {sample.name: by_name[sample.name] for sample in splits.unlabeled}, merged(partners)
    reliable = broadcast(write_selection, stage.folder, *both, index, settings.keep, classes)
    return {"images": reliable}


def _stability(
    stage: Stage, teacher: Path, pseudo_labeled: Sequence[Sample]
) -> Iterator[dict[str, float]]:
    """Score images by the mIoU of earlier checkpoints' predictions with the pseudo labels, summed.

    Source: ST++ (Yang et al., CVPR 2022, section 3.3). Deviates: predictions without views.
    """
    config, classes = stage.config, len(describe(stage.config.dataset).classes)
    files = [teacher / f"earlier_{number}.pth" for number in range(1, len(EARLIER) + 1)]
    nets = [_teacher(stage, file) for file in files]
    predictors = [Predictor(net, stage.device, config.inference) for net in nets]
    loader = _whole(config, pseudo_labeled, nets[0].preprocessing)
    for batch in passes(loader, stage.device, f"{stage.name} unlabeled"):
        scores = dict.fromkeys((pseudo_labeled[index].name for index in batch.index), 0.0)
        for predict in predictors:
            ids = predict(batch.image, tuple(batch.label.shape[-2:])).argmax(dim=1)
            for name, predicted, label in zip(scores, ids, batch.label, strict=True):
                matrix = ConfusionMatrix(classes, stage.device.torch_device)
                matrix.update(predicted, label)
                miou = matrix.mean_iou()
                scores[name] += miou if math.isfinite(miou) else -math.inf  # all is ignored
        yield scores


def retrain(
    stage: Stage,
    splits: Splits,
    pseudo_labeled: Sequence[Sample],
    teacher: Path,
    index: QueryIndex,
    truth: Mapping[str, Sample] = MappingProxyType({}),
) -> Report:
    """Stages 4 and 6: a student on labeled and pseudo-labeled images.

    True masks of these, by image name, are drawn in query panels and not used otherwise.
    """
    config, settings = stage.config, stage.config.retrain
    chance = Chance(config.seed, stage.name)
    net, frozen_teacher = _new_network(stage, chance), _teacher(stage, checkpoint_of(teacher))
    if settings.start == "teacher":
        load_weights(net, checkpoint_of(teacher))
    average = deepcopy(net).requires_grad_(False) if settings.labels == "average" else None
    read = sample_reader(config.cache, [*pseudo_labeled, *splits.labeled], config.workers)
    querier, preprocessing = _querier(config, splits, index, read), net.preprocessing
    with_image = settings.weight == "image" or settings.mix == "queried" or settings.learn_queried
    samples = RetrainSamples(
        pseudo_labeled,
        splits.labeled,
        partial(querier.draw, preprocessing=preprocessing) if with_image else querier.choose,
        config.augment,
        chance,
        settings.views,
        settings.teacher_view == "strong",
        read,
        preprocessing,
    )
    rule = weighting(stage, frozen_teacher, splits.labeled)
    thresholds = ClassThresholds(len(describe(config.dataset).classes), settings)
    thresholds.to(stage.device.torch_device)
    prepare = partial(
        student_batch,
        teacher=frozen_teacher,
        average=average,
        rule=rule,
        thresholds=thresholds,
        settings=settings,
    )
    objective = partial(
        retrain_objective, labeled_loss=_labeled_loss(config.ohem), dropout=settings.feature_dropout
    )
    size, of_teacher = settings.batch_size, rule.confident and average is None
    crops = Crops(
        labeled=size * (1 + settings.learn_queried),
        unlabeled=size * (settings.views + (settings.feature_dropout > 0)),
        teacher=size * (max(rule.passes, of_teacher) + (average is not None)),
    )

    def judge(sample: RetrainSample) -> tuple[Tensor, Tensor]:
        label, weight, *confidence = judged(sample, frozen_teacher, average, rule)
        if settings.threshold:
            weight = weight * thresholds.reached(*confidence, label)
        return label, weight

    panels = QueryPanels(stage, pseudo_labeled, truth, querier, frozen_teacher, judge)
    outcome = fit(
        stage,
        net,
        objective,
        samples,
        settings,
        splits.val,
        crops,
        prepare=prepare,
        average=average,
        running=thresholds,
        show=panels.draw,
    )
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


def label_confidence(teacher: nn.Module, features: Tensor, label: Tensor) -> Tensor:
    """Return the teacher's probability of stored (B, H, W) labels; 0 where they are ignored."""
    probability = full_size(teacher.classify(features), label).softmax(dim=1)
    valid = label != IGNORE
    return probability.gather(1, label.where(valid, 0).unsqueeze(1)).squeeze(1) * valid


class ClassThresholds(nn.Module):
    """Which pixels are confident enough: one threshold, or one of each class.

    The threshold of a class is ``retrain.threshold`` times its running mean confidence over that
    of the most confident class. Source: FlexMatch (Zhang et al., NeurIPS 2021) and FreeMatch (Wang
    et al., ICLR 2023). Deviates: the running confidence alone, in place of counts and of a
    running threshold.
    """

    def __init__(self, num_classes: int, settings: RetrainSection) -> None:
        super().__init__()
        self.settings = settings
        self.register_buffer("mean", torch.ones(num_classes))
        self.register_buffer("seen", torch.zeros(num_classes, dtype=torch.bool))

    def forward(self, confidence: Tensor, label: Tensor) -> Tensor:
        """Tell which (B, H, W) pixels reach their class's threshold: bool. Collective."""
        if self.settings.threshold_by_class:
            self._update(confidence, label)
        return self.reached(confidence, label)

    def reached(self, confidence: Tensor, label: Tensor) -> Tensor:
        """Tell it by the running means as they are."""
        if not self.settings.threshold_by_class:
            return confidence >= self.settings.threshold
        highest = self.mean.where(self.seen, 0).max().clamp_min(1e-6)
        limits = self.settings.threshold * self.mean / highest
        return confidence >= limits[label.where(label != IGNORE, 0)]

    def _update(self, confidence: Tensor, label: Tensor) -> None:
        regions = [label == class_id for class_id in range(len(self.mean))]  # deterministic sums
        sums = torch.stack([(confidence * region).sum() for region in regions])
        counts = torch.stack([region.sum() for region in regions])
        sums, counts = reduced(torch.stack([sums.float(), counts.float()]))
        moved = self.mean.lerp(sums / counts.clamp_min(1), 1 - self.settings.average_decay)
        self.mean.copy_(torch.where(counts > 0, moved, self.mean))
        self.seen |= counts > 0


# The rules that weigh pixels of pseudo labels. Each takes the frozen teacher's features of the
# images, None if the rule has no passes; the samples; the (B, H, W) probability of their labels,
# None if the rule is not confident. Each returns (B, H, W) float32 in [0, 1].


def weight_one(_: Tensor | None, samples: RetrainSample, __: Tensor | None) -> Tensor:
    """Weigh every pixel 1: plain self-training."""
    return torch.ones_like(samples.pseudo_label, dtype=torch.float32)


def weight_by_confidence(_: Tensor | None, __: RetrainSample, confidence: Tensor) -> Tensor:
    """Weigh pixels by the probability of their pseudo label."""
    return confidence


def weight_by_image(
    features: Tensor, samples: RetrainSample, _: Tensor | None, teacher: nn.Module
) -> Tensor:
    """Weigh pixels by the queried images, which pass the teacher too."""
    queried = samples.queried
    region = class_region(queried.label, queried.shared_class)
    prototype = masked_average_pooling(teacher.extract(queried.image), region)
    return cross_image_weight(features, prototype, samples.pseudo_label, queried.shared_class)


def weight_by_bank(
    features: Tensor, samples: RetrainSample, _: Tensor | None, bank: Tensor
) -> Tensor:
    """Weigh pixels by stored prototypes of whole labeled images, (labeled images, C, D)."""
    queried = samples.queried
    some_class = queried.shared_class.clamp_max(bank.shape[1] - 1)  # 255 has weight 1 anyway
    prototype = bank[queried.position, some_class]
    return cross_image_weight(features, prototype, samples.pseudo_label, queried.shared_class)


def weight_by_anchors(
    features: Tensor,
    samples: RetrainSample,
    confidence: Tensor | None,
    anchors: Tensor,
    confident: bool,
) -> Tensor:
    """Weigh pixels by similarity to their class's anchor, of (C, D), times confidence or not."""
    weight = anchor_weight(features, samples.pseudo_label, anchors)
    return weight * confidence if confident else weight


class Rule(NamedTuple):
    """How the pixels of pseudo labels are weighed."""

    weigh: Callable[[Tensor | None, RetrainSample, Tensor | None], Tensor]
    passes: int  # images that pass the frozen teacher for each unlabeled one
    confident: bool  # it, or ``retrain.threshold``, takes the probability of the labels


def weighting(stage: Stage, teacher: nn.Module, labeled: Sequence[Sample]) -> Rule:
    """Return the rule that ``retrain.weight`` names."""
    rule, confident = stage.config.retrain.weight, stage.config.retrain.threshold > 0
    if rule == "image":
        return Rule(partial(weight_by_image, teacher=teacher), 2, confident)
    if rule == "bank":
        bank = prototype_bank(stage, teacher, labeled)
        return Rule(partial(weight_by_bank, bank=bank), 1, confident)
    if rule.endswith("anchors"):
        anchors, times = class_anchors(stage, teacher, labeled), rule != "anchors"
        weigh = partial(weight_by_anchors, anchors=anchors, confident=times)
        return Rule(weigh, 1, times or confident)
    if rule == "confidence":
        return Rule(weight_by_confidence, 0, confident=True)
    return Rule(weight_one, 0, confident)


class StudentBatch(NamedTuple):
    """What a student passes and learns from in an iteration: K labeled images, V views."""

    labeled_image: Tensor  # (B, K, 3, H, W) float, normalised
    labeled_label: Tensor  # (B, K, H, W) long, true, 255 = ignored
    view_image: Tensor  # (B, V, 3, H, W) float, normalised: of unlabeled images
    view_label: Tensor  # (B, V, H, W) long, 255 = ignored
    view_weight: Tensor  # (B, V, H, W) float in [0, 1]
    shared_class: Tensor  # (B,) long, of the query, 255 = none


def student_batch(
    samples: RetrainSample,
    teacher: nn.Module,
    average: nn.Module | None,
    rule: Rule,
    thresholds: ClassThresholds,
    settings: RetrainSection,
) -> StudentBatch:
    """Label, weigh and mix the unlabeled images of a batch. Collective.

    Args:
        samples: the batch, with the stored pseudo labels.
        teacher: frozen.
        average: running average of the student, which labels instead; None: the stored labels.
        rule: weighs pixels.
        thresholds: which pixels weigh at all; not used if ``retrain.threshold`` is 0.
        settings: ``mix`` is applied to each of the ``views`` in strong colours; with
            ``feature_dropout`` the weak view comes last, unmixed; with ``learn_queried`` the
            queried images are labeled images too. Networks see ``accumulate`` parts in turn.
    """
    columns = zip(
        *(judged(part, teacher, average, rule) for part in parts(samples, settings.accumulate)),
        strict=True,
    )
    label, weight, *confidence = (torch.cat(column) for column in columns)
    if settings.threshold:
        weight = weight * thresholds(*confidence, label)
    labeled, queried = [(samples.labeled_image, samples.labeled_label)], None
    if isinstance(samples.queried, QueriedImage):
        queried = View(samples.queried.image, samples.queried.label, torch.ones_like(weight))
    if settings.learn_queried:
        labeled.append(queried[:2])
    mix = MIXES[settings.mix]
    views = [mix(View(image, label, weight), queried) for image in samples.student_image.unbind(1)]
    if settings.feature_dropout:
        views.append(View(samples.image, label, weight))
    images, labels = (torch.stack(column, dim=1) for column in zip(*labeled, strict=True))
    mixed = View(*(torch.stack(column, dim=1) for column in zip(*views, strict=True)))
    return StudentBatch(images, labels, *mixed, samples.queried.shared_class)


def judged(
    samples: RetrainSample, teacher: nn.Module, average: nn.Module | None, rule: Rule
) -> tuple[Tensor, ...]:
    """Label and weigh unlabeled images as ``student_batch`` says.

    Returns:
        Labels (B, H, W) long, their weights (B, H, W) float in [0, 1]; and, if the rule is
        confident, their probabilities, (B, H, W) float.
    """
    features = confidence = None
    if rule.passes or (rule.confident and average is None):
        features = teacher.extract(samples.image)
    if average is not None:
        samples, confidence = predicted_labels(average, samples)
    elif rule.confident:
        confidence = label_confidence(teacher, features, samples.pseudo_label)
    weight = rule.weigh(features, samples, confidence)
    return samples.pseudo_label, weight, *([confidence] if rule.confident else [])


def retrain_objective(
    net: nn.Module,
    part: StudentBatch,
    batch: StudentBatch,
    labeled_loss: LabeledLoss,
    dropout: float = 0.0,
) -> Loss:
    """Rectified cross entropy of unlabeled images, and cross entropy of labeled ones.

    Args:
        net: the student; all images pass it as one batch.
        part: the batch, or a part of it.
        batch: all of this process's batch.
        labeled_loss: cross entropy of logits and true labels.
        dropout: share of the features that the last view loses; its loss then counts as much as
            the mean of the others. 0: all views count alike.

    Source: docs/method.md, sections 4 and 9.
    """
    true, pseudo, weights = (
        maps.unbind(1) for maps in (part.labeled_label, part.view_label, part.view_weight)
    )
    masks = [*(batch.labeled_label != IGNORE).unbind(1), *(batch.view_label != IGNORE).unbind(1)]
    *pixels, images = counted(*masks, torch.ones_like(batch.shared_class))
    labeled_pixels, view_pixels = pixels[: len(true)], pixels[len(true) :]
    passed = torch.cat([*part.labeled_image.unbind(1), *part.view_image.unbind(1)])
    dropped = (len(part.shared_class), dropout) if dropout else ()
    logits = net(passed, *dropped).logits.chunk(len(pixels))
    labeled_logits, view_logits = logits[: len(true)], logits[len(true) :]
    labeled = sum(map(labeled_loss, labeled_logits, true, labeled_pixels))
    losses = torch.stack([*map(rectified_cross_entropy, view_logits, pseudo, weights, view_pixels)])
    unlabeled = (losses[:-1].mean() + losses[-1]) / 2 if dropout else losses.mean()
    weighed = (part.view_weight * (part.view_label != IGNORE)).sum()
    terms = {
        "unlabeled": unlabeled,
        "labeled": labeled,
        "weight": weighed / sum(view_pixels).clamp_min(1),
        "queried": (part.shared_class != IGNORE).sum() / images,
    }
    return Loss(unlabeled + labeled, terms)


def training_step(
    student: nn.Module,
    objective: Objective,
    optimization: Optimization,
    device: Device,
    batch: Any,
    seed: int,
    count: int = 1,
    prepare: Prepare | None = None,
) -> tuple[dict[str, Tensor], float | None]:
    """Update the weights once by the objective of a batch.

    Args:
        student: from ``parallel``.
        objective: of the network, a part of a batch, and the batch.
        optimization: of the student.
        device: its precision; the batch is there.
        batch: a record of tensors.
        seed: of dropout and mixing.
        count: parts that pass one after another; batch norm sees one at a time.
        prepare: makes of the batch, without gradients, what the objective takes.

    Returns:
        This process's part of the logged terms; and None, or the loss where it or the gradient is
        not finite: then no weight was updated.
    """
    torch.manual_seed(seed)
    terms: dict[str, Any] = {}
    if prepare is not None:
        with torch.no_grad(), device.autocast():
            batch = prepare(batch)
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
    crops: Crops,
    prepare: Prepare | None = None,
    average: nn.Module | None = None,
    running: nn.Module | None = None,
    earlier: Sequence[float] = (),
    show: Callable[[nn.Module, int, int], None] | None = None,
) -> Report:
    """Train a network, write ``checkpoint.pth``; continue where an earlier run was stopped.

    Args:
        stage: where it works; its config and device.
        net: on the device; it is changed in place.
        objective: of the network, a part of a batch, and the batch.
        dataset: what the batches are made of.
        settings: length and batch size of the stage.
        val: images to validate on.
        crops: images an iteration.
        prepare: see ``training_step``.
        average: like the network; becomes its running average, and is validated and kept.
        running: a module whose buffers ``prepare`` changes, to be resumed.
        earlier: shares of the stage after which ``earlier_1.pth`` and so on are written too.
        show: draws the network after so many epochs and iterations, as ``panels.every`` says.

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
    update = partial(
        training_step,
        student,
        objective,
        optimization,
        device,
        count=settings.accumulate,
        prepare=prepare,
    )
    best = config.evaluate.checkpoint == "best"
    images = crops.labeled + crops.unlabeled
    bar = StageBar(stage.name, iterations, steps, images, stage.advance)
    with bar, Progress(stage, net, optimization, bar, running) as at:
        epochs, outcome = range(at.epoch, count), at.report
        batches = training_batches(dataset, size, epochs, chance, config.workers, at.step)
        for epoch in epochs:
            net.train()
            bar.start(epoch, at.seen)
            for step in range(at.step, min(steps, iterations - epoch * steps)):
                batch, rate = device.move(next(batches)), optimization.lr
                seed = chance.torch_seed(epoch, step, rank())
                terms, spoilt = update(batch=batch, seed=seed)
                if spoilt is not None:
                    keys = batch_keys(len(dataset), size, epoch, step, chance)
                    stage.refuse_not_finite(epoch, step, spoilt, dataset.names(keys))
                bar.update(terms, rate)
                at.step_done()
            broadcast_buffers(net, kept)  # what is validated is what rank 0 saves and draws
            numbers, last, ious = bar.means(), epoch + 1 == count, {}
            passed = min((epoch + 1) * steps, iterations)
            if last or (epoch + 1) % config.evaluate.every == 0:
                matrix = _validated(stage, kept, val)
                numbers["miou"] = matrix.mean_iou()
                ious = matrix.report(classes)["per_class_iou"]
                if numbers["miou"] > outcome.get("miou", -1.0) if best else last:
                    outcome = {**numbers, **matrix.report(classes), "epoch": epoch + 1}
                    stage.save(kept, epoch + 1)
            for number, share in enumerate(earlier, start=1):
                if epoch + 1 == math.ceil(count * share):
                    stage.save(kept, epoch + 1, f"earlier_{number}.pth")
            if show is not None and (last or (epoch + 1) % config.panels.every == 0):
                show(kept, epoch + 1, passed)
            stage.record(epoch + 1, numbers, passed, ious)
            at.epoch_done(outcome)
    seen = {f"{kind}_crops": number * iterations for kind, number in crops._asdict().items()}
    return {**outcome, "iterations": iterations, **seen}


def _validated(stage: Stage, net: nn.Module, val: Sequence[Sample]) -> ConfusionMatrix:
    """Compare a network's predictions with the labels of val. Collective."""
    config, loader = stage.config, _whole(stage.config, val, net.preprocessing)
    predict = Predictor(net.eval(), stage.device, config.inference)
    return validate(predict, loader, len(describe(config.dataset).classes))


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


def trained_network(config: Config, file: Path) -> nn.Module:
    """Load the network of a checkpoint."""
    net = network_of(config.model, len(describe(config.dataset).classes), pretrained=None)
    load_weights(net, file)
    return net


def _teacher(stage: Stage, file: Path) -> nn.Module:
    """Load the network of a checkpoint, frozen."""
    return frozen(trained_network(stage.config, file), stage.device)


def _labeled_loss(ohem: OhemSection | None) -> LabeledLoss:
    return cross_entropy if ohem is None else partial(ohem_cross_entropy, **ohem.model_dump())


def _querier(config: Config, splits: Splits, index: QueryIndex, read: SampleReader) -> Querier:
    rule = QueryRule.of(config.query, describe(config.dataset))
    return Querier(splits.labeled, index, rule, config.augment, read)


def _keep_predictions(run: Run, val: Sequence[Sample], *stages: Path) -> None:
    """Keep the predictions of val by the networks of stages, and draw some of them."""
    folder, kind = run.folder / "val", describe(run.config.dataset)

    def opened(stage: Path) -> tuple[Predictor, Any]:
        net = run.device.place(trained_network(run.config, checkpoint_of(stage)))
        predict = Predictor(net.eval(), run.device, run.config.inference)
        return predict, _whole(run.config, val, net.preprocessing)

    for stage in stages:
        made_from = run.digest(checkpoint_of(stage))
        keep_predictions(folder, stage.name, made_from, val, kind, partial(opened, stage))
    names = list(dict.fromkeys(stage.name for stage in stages))
    draw_examples(run.folder / "examples.png", folder, names, val, kind)


def main() -> None:
    """Read the command line and train; with ``torchrun``, as one of several processes."""
    # The same command gives the same bits; faster convolutions cost determinism.
    deterministic = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True)
    with joined(), deterministic:
        train(*read_arguments())


def read_arguments() -> tuple[Config, int | None, bool, bool]:
    """Read the command line: settings, the stage to start from, whether to start over, --verify."""
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", required=True, help="a YAML file, here or in configs/")
    parser.add_argument("--method", choices=METHODS, help="settings of configs/methods/")
    parser.add_argument(
        "settings", nargs="*", metavar="key=value", help="such as retrain.epochs=40"
    )
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--from-stage", type=int, choices=range(1, 7), help="do it and later again")
    again.add_argument("--fresh", metavar="NAME", help="remove all that the run of this name made")
    parser.add_argument(
        "--verify", action="store_true", help="read the files of finished stages and compare them"
    )
    arguments = parser.parse_intermixed_args()
    config = read_config(arguments.config, arguments.settings, arguments.method)
    if arguments.fresh not in (None, config.name):
        raise UserError(f"--fresh: this run is called '{config.name}', not '{arguments.fresh}'")
    if arguments.fresh is not None and arguments.verify:
        raise UserError("--fresh and --verify do not go together; leave one of them out")
    return config, arguments.from_stage, arguments.fresh is not None, arguments.verify


if __name__ == "__main__":
    exit_with_one_line(main)
