"""Train a segmentation network on few labels and many images: the six stages of CISC-R.

python train.py --config pascal.yaml [--method NAME] [section.key=value ...]
    [--from-stage N | --fresh NAME] [--verify]
"""

import math
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dataset.cache import sample_reader
from dataset.catalog import dataset_info
from dataset.lists import (
    Sample,
    SampleReader,
    Splits,
    count_class_pixels,
    lists_of,
    mask_file,
    read_splits,
    read_truth,
    refuse_broken_images,
    with_pseudo_masks,
)
from dataset.loader import RandomStreams, whole_images
from dataset.predictions import draw_examples, keep_predictions
from dataset.query import Querier, QueryIndex, QueryRule, build_query_index
from dataset.training import LabeledPair, LabeledPairs, RetrainSample, RetrainSamples
from dataset.votes import votes_file, write_votes
from model import refuse_crop, start_from
from model.cisc.anchors import read_selection, select
from model.cisc.calibration import FOLD_LENGTH, draw_folds
from model.cisc.doubt import ImageSummary, encode, summarize, write_features, write_summaries
from model.cisc.maps import consistency_loss
from model.cisc.panels import Panels, keep_opinions, shown_samples
from model.cisc.pseudo_labels import (
    FoldTeacher,
    Opinions,
    PseudoLabeler,
    discount_votes,
    fit_votes,
    read_exponents,
)
from model.cisc.students import ClassPixels, Labeler, StudentBatch, needs_teacher, student_batch
from model.cisc.votes import describe_voters
from model.fitting import Crops, Loss, TrainingData, fit
from model.losses import (
    balanced_weights,
    cross_entropy,
    dice_loss,
    ohem_cross_entropy,
    rectified_cross_entropy,
    rectified_dice_loss,
    refuse_class_weights,
    scale_weights,
)
from model.networks import load_frozen, load_network, network_of
from utils import IGNORE
from utils.config.batches import count_iterations, count_repeats, count_samples, refuse_batch_sizes
from utils.config.reading import METHODS, read_config
from utils.config.schema import Config, EvaluateSection, SelectSection
from utils.device import fixed_order
from utils.distributed import (
    all_reduce_count,
    broadcast,
    gather_dict,
    process_group,
)
from utils.errors import Parser, UserError, exit_with_one_line
from utils.evaluation import Predictor, iterate_batches, validate
from utils.files import in_background
from utils.panels import save_mask
from utils.run.resume import Journal
from utils.run.rounds import former_network
from utils.run.stages import Report, Run, Stage, checkpoint_of
from utils.scores import group_images

_AT_THE_END = EvaluateSection(every=1_000_000)  # a fold says nothing on the way
LabeledLoss = Callable[..., Tensor]  # of logits, labels and the valid pixels of the batch
PseudoLoss = Callable[..., Tensor]  # of logits, pseudo labels, weights and the valid pixels


def train(
    config: Config, from_stage: int | None = None, fresh: bool = False, verify: bool = False
) -> None:
    """Run the six stages, or those that are left of them."""
    info, notes = dataset_info(config.dataset), list[str]()
    splits = read_splits(config.dataset, lists_of(config.stages), notes.append)
    truth = read_truth(config.dataset, config.panels.truth)  # is drawn, nothing else
    refuse_batch_sizes(config, len(splits.labeled), len(splits.unlabeled))
    refuse_class_weights(config.loss, info.classes)
    refuse_crop(config.model.backbone, config.augment.crop_size)
    for samples in (splits.labeled, splits.val, splits.test):
        group_images([sample.name for sample in samples], config.dataset.groups)
    rule = QueryRule.of(config.query, info)
    queries = config.pairs_share_classes or config.retraining_queries
    index = build_query_index(splits.labeled, rule) if queries else None
    run = Run(config, from_stage, fresh, splits.digests(), verify)
    is_new = broadcast(lambda: run.is_new)
    if is_new:  # else a truncated image could end a late stage
        notes += broadcast(refuse_broken_images, splits)
    if (is_new or from_stage == 2) and 2 in config.stages and config.pseudo_label.neighbours:
        notes.append(broadcast(describe_voters, config, run.device, splits))
    with run, fixed_order(config.deterministic):
        for note in notes:
            run.log.say(note)
        first = final = run.stage("1_supervised", train_supervised, splits, index)
        teacher, labeled_by, pseudo_labeled = first, [], splits.unlabeled
        votes = None
        if 2 in config.stages:
            if config.pseudo_label.neighbours:
                votes = fit_votes_beside_teachers(run, splits)
            labeling = Labeling(first, votes, config.retrain.labels == "average")
            stage = "2_pseudo_label"
            labeled_by = [run.stage(stage, write_pseudo_labels, labeling, splits, splits.unlabeled)]
            pseudo_labeled = with_pseudo_masks(splits.unlabeled, labeled_by[0] / "masks")
        if 3 in config.stages:
            partners = index if config.retraining_queries else None
            chosen = run.stage("3_select", select, first, splits, pseudo_labeled, partners)
            reliable, unreliable, index = read_selection(chosen, splits.unlabeled, info.classes)
            pseudo_labeled = with_pseudo_masks(reliable, labeled_by[0] / "masks")
            source = RetrainSource(first, index, labeled_by, truth, votes)
            teacher = run.stage("4_retrain", retrain, splits, pseudo_labeled, source)
            seen = splits.labeled, unreliable, votes, (first, teacher)
            votes = votes and run.stage("5_votes", discount_votes, *seen)
            labeling, stage = Labeling(teacher, votes), "5_relabel"
            labeled_by.append(run.stage(stage, write_pseudo_labels, labeling, splits, unreliable))
            pseudo_labeled += with_pseudo_masks(unreliable, labeled_by[1] / "masks")
        if 6 in config.stages:
            source = RetrainSource(teacher, index, labeled_by, truth, votes)
            final = run.stage("6_retrain", retrain, splits, pseudo_labeled, source)
        run.finish()
        _keep_predictions(run, splits.val, first, final)
        if splits.test:
            run.add_result("test", _score(run, final, splits.test))


def train_supervised(stage: Stage, splits: Splits, index: QueryIndex | None) -> Report:
    """Stage 1: pairs of labeled images, cross entropy on both, and the consistency loss."""
    config, streams = stage.config, RandomStreams(stage.config.seed, stage.name)
    run = stage.folder.parent
    former = former_network(run) if config.supervised.start == "last" else None
    net = _new_network(stage, streams, former)
    read = sample_reader(config.cache, splits.labeled, config.workers)
    shares = config.pairs_share_classes
    pairs = LabeledPairs(
        splits.labeled,
        config.augment,
        streams,
        count_repeats(config.supervised, len(splits.labeled)),
        _querier(config, splits, index, read) if shares else None,
        read,
        net.preprocessing,
    )
    losses = _losses(stage, splits.labeled)
    loss = partial(
        supervised_loss,
        labeled_loss=losses.labeled,
        consistency=config.supervised.consistency,
    )
    classes = len(dataset_info(config.dataset).classes)
    objective = SupervisedObjective(loss, ClassPixels(classes, losses.class_weights))
    outcome = fit(stage, net, objective, TrainingData(pairs, splits.val), config.supervised)
    start = {} if former is None else {"started_from": former.relative_to(run).as_posix()}
    return {"labeled_images": len(splits.labeled), **start, **outcome}


def train_fold(stage: Stage, splits: Splits, fold: Sequence[Sample]) -> Report:
    """Train as stage 1 does, shorter and without a fold of the labeled images, its validation."""
    config, settings = stage.config, stage.config.supervised
    rest = [sample for sample in splits.labeled if sample not in fold]
    iterations = count_iterations(settings, count_samples(settings, len(splits.labeled)))
    # A network of an earlier round has seen the fold.
    shorter = {"iterations": math.ceil(FOLD_LENGTH * iterations), "start": "encoder"}
    own = {"supervised": settings.model_copy(update=shorter), "evaluate": _AT_THE_END}
    stage = replace(stage, config=config.model_copy(update={**own, "select": SelectSection()}))
    rule = QueryRule.of(config.query, dataset_info(config.dataset))
    index = build_query_index(rest, rule) if config.pairs_share_classes else None
    return train_supervised(stage, splits._replace(labeled=rest, val=fold), index)


def fit_votes_beside_teachers(run: Run, splits: Splits) -> Path:
    """Find out how far votes are to be believed, by teachers that leave labeled images out."""
    config, settings = run.config, run.config.supervised
    folds = draw_folds(splits.labeled, config.dataset.groups, RandomStreams(config.seed, "folds"))
    fewest = len(splits.labeled) - max(map(len, folds), default=0)
    if settings.batch_size > count_samples(settings, fewest):
        folds = []
    teachers = [
        FoldTeacher(run.stage(f"1_fold_{number}", train_fold, splits, fold), fold)
        for number, fold in enumerate(folds, start=1)
    ]
    return run.stage("2_votes", fit_votes, splits.labeled, teachers)


class Labeling(NamedTuple):
    """What labels images."""

    teacher: Path  # folder of the training stage
    votes: Path | None  # folder of the stage that fitted votes
    stores_votes: bool = False  # where there are some: for retraining that labels anew


@torch.inference_mode()
def write_pseudo_labels(
    stage: Stage, labeling: Labeling, splits: Splits, unlabeled: Sequence[Sample]
) -> Report:
    """Stages 2 and 5: the most probable class of every pixel by teacher and votes, as PNGs.

    Stage 2 stores the votes, too, if retraining asks for them.
    """
    config, info = stage.config, dataset_info(stage.config.dataset)
    device, file = stage.device, checkpoint_of(labeling.teacher)
    labeler = PseudoLabeler(config, device, file, splits.labeled, labeling.votes)
    shown = {x.name for x in shown_samples(splits.unlabeled, config.panels.images)}
    journal = Journal(stage)
    done = broadcast(journal.read)
    loader = whole_images(config, unlabeled, labeler.teacher.preprocessing, frozenset(done))

    def keep(
        samples: Sequence[Sample], masks: Any, ratios: Any, found: Sequence[ImageSummary]
    ) -> dict[str, ImageSummary]:
        files = [[mask_file(stage.folder / "masks", sample)] for sample in samples]
        for (file,), mask in zip(files, masks, strict=True):
            save_mask(file, mask, info.palette(), durable=False)  # the end of the stage waits
        if ratios is not None:
            for own, sample, ratio in zip(files, samples, ratios, strict=True):
                own.append(votes_file(stage.folder / "votes", sample))
                write_votes(own[-1], ratio)
        return journal.add([sample.name for sample in samples], files, found)

    with in_background(max(1, config.workers)) as write:  # while the next batches are predicted
        kept = []
        for batch in iterate_batches(loader, stage.device, stage.name):
            samples = [unlabeled[index] for index in batch.index.tolist()]
            opinions = labeler(batch.image, tuple(batch.label.shape[-2:]))
            for number, sample in enumerate(samples):
                if opinions.votes is not None and sample.name in shown:
                    one = slice(number, number + 1)
                    own = Opinions(*(maps[one] for maps in opinions))
                    keep_opinions(stage.folder, sample, batch.image[one], own, labeler)
            probabilities, ids = opinions.both.max(dim=1)
            ids = ids.where(probabilities >= config.pseudo_label.threshold, IGNORE)
            ratios = opinions.by_patch if labeling.stores_votes else None
            if ratios is not None:
                ratios = ratios.half().cpu().numpy()
            found = summarize(opinions)
            kept.append(write(keep, samples, ids.byte().cpu().numpy(), ratios, found))
    done |= gather_dict([batch.result() for batch in kept])
    summaries = {sample.name: done[sample.name] for sample in unlabeled}
    if stage.name.startswith("2"):
        features = {name: found["features"] for name, found in summaries.items()}
        write_features(stage.folder, features | _features_of(stage, labeler, splits.labeled))
    return write_summaries(stage.folder, info.classes, summaries)


def _features_of(stage: Stage, labeler: PseudoLabeler, labeled: Sequence[Sample]) -> dict[str, str]:
    """Return the features of labeled images: unlabeled ones may resemble them. Collective."""
    kept = list[tuple[str, str]]()
    loader = whole_images(stage.config, labeled, labeler.teacher.preprocessing)
    for batch in iterate_batches(loader, stage.device, "labeled images"):
        found = encode(labeler.features(batch.image, tuple(batch.label.shape[-2:])))
        kept += zip((labeled[index].name for index in batch.index.tolist()), found, strict=True)
    seen = gather_dict([dict(kept)])
    return {sample.name: seen[sample.name] for sample in labeled}


class RetrainSource(NamedTuple):
    """What stages 4 and 6 are made from, beside the images."""

    teacher: Path  # folder of the training stage
    index: QueryIndex | None  # partners by class; None where none are queried
    labeled_by: Sequence[Path]  # folders of the labeling stages so far
    truth: Mapping[str, Sample]  # true masks by image name: drawn in panels, not used otherwise
    votes: Path | None = None  # folder of the stage that fitted votes


def retrain(
    stage: Stage, splits: Splits, pseudo_labeled: Sequence[Sample], source: RetrainSource
) -> Report:
    """Stages 4 and 6: a student on labeled and pseudo-labeled images."""
    config, settings = stage.config, stage.config.retrain
    streams, teacher_file = RandomStreams(config.seed, stage.name), checkpoint_of(source.teacher)
    net = _new_network(stage, streams, teacher_file if settings.start == "teacher" else None)
    average = deepcopy(net).requires_grad_(False) if settings.labels == "average" else None
    exponents = None if average is None else read_exponents(source.votes)
    teacher = load_frozen(config, stage.device, teacher_file) if needs_teacher(settings) else None
    read = sample_reader(config.cache, [*pseudo_labeled, *splits.labeled], config.workers)
    samples = RetrainSamples(
        pseudo_labeled,
        splits.labeled,
        config.augment,
        streams,
        settings.views,
        settings.teacher_view == "strong",
        _querier(config, splits, source.index, read) if config.retraining_queries else None,
        read,
        net.preprocessing,
        # Stage 2 stored them for all images; those of stage 5 would be the same.
        None if exponents is None else source.labeled_by[0] / "votes",
    )
    labeler = Labeler(settings, teacher, average, exponents)
    losses = _losses(stage, splits.labeled)
    loss = partial(
        retrain_loss,
        labeled_loss=losses.labeled,
        dropout=settings.feature_dropout,
        pseudo_loss=losses.pseudo,
    )
    shown = shown_samples(splits.unlabeled, config.panels.images)
    stored = config.pseudo_label.neighbours and average is None  # else the crop's labels count
    by_votes = source.labeled_by if stored else ()
    panels = Panels(stage, samples, shown, labeler, by_votes, source.truth)
    seen = ClassPixels(len(dataset_info(config.dataset).classes), losses.class_weights)
    objective = RetrainObjective(loss, seen, labeler, panels)
    outcome = fit(stage, net, objective, TrainingData(samples, splits.val), settings)
    return {"images": len(samples), **outcome}


@dataclass
class SupervisedObjective:
    """Stage 1."""

    loss: Callable[[nn.Module, LabeledPair, LabeledPair], Loss]
    seen: ClassPixels
    average: None = None

    def prepare(self, batch: LabeledPair) -> LabeledPair:
        """Count the classes."""
        self.seen.count(batch.label, batch.partner_label)
        return batch

    def crops(self, batch_size: int) -> Crops:
        """Both images of each pair."""
        return Crops(labeled=2 * batch_size, unlabeled=0)

    def draw(self, net: nn.Module, epoch: int, iteration: int) -> None:
        """Draw nothing."""


@dataclass
class RetrainObjective:
    """Stages 4 and 6."""

    loss: Callable[[nn.Module, StudentBatch, StudentBatch], Loss]
    seen: ClassPixels
    labeler: Labeler
    panels: Panels

    @property
    def average(self) -> nn.Module | None:
        """The network that labels, if the student's running average does."""
        return self.labeler.average

    def prepare(self, batch: RetrainSample) -> StudentBatch:
        """Label, weigh and mix; count the classes."""
        prepared = student_batch(batch, self.labeler)
        learnt = prepared.view_label.where(prepared.view_weight > 0, IGNORE)
        self.seen.count(prepared.labeled_label)
        self.seen.count_pseudo(learnt)
        return prepared

    def crops(self, batch_size: int) -> Crops:
        """Labeled images, views of unlabeled ones, and what labels and weighs them."""
        settings = self.labeler.settings
        labeled = 1 + settings.learn_partners
        views = settings.views + (settings.feature_dropout > 0)
        return Crops(*(batch_size * each for each in (labeled, views, self.labeler.images_passed)))

    def draw(self, net: nn.Module, epoch: int, iteration: int) -> None:
        """Draw the panels."""
        self.panels.draw(net, epoch, iteration)


def supervised_loss(
    net: nn.Module,
    pair: LabeledPair,
    batch: LabeledPair,
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
    pixels, partner_pixels, pairs = all_reduce_count(
        batch.label != IGNORE, batch.partner_label != IGNORE, batch.shared_class != IGNORE
    )
    output = net(torch.cat([pair.image, pair.partner_image]))
    logits, partner_logits = output.logits.chunk(2)
    features, partner_features = output.features.chunk(2)
    entropy = labeled_loss(logits, pair.label, pixels)
    entropy = entropy + labeled_loss(partner_logits, pair.partner_label, partner_pixels)
    if consistency == 0:
        return Loss(entropy, {"ce": entropy})
    consistent = consistency_loss(
        features, partner_features, pair.label, pair.partner_label, pair.shared_class, pairs
    )
    return Loss(entropy + consistency * consistent, {"ce": entropy, "consistency": consistent})


def retrain_loss(
    net: nn.Module,
    part: StudentBatch,
    batch: StudentBatch,
    labeled_loss: LabeledLoss,
    dropout: float = 0.0,
    pseudo_loss: PseudoLoss = rectified_cross_entropy,
) -> Loss:
    """Rectified cross entropy of unlabeled images, and cross entropy of labeled ones.

    Args:
        net: the student; all images pass it as one batch.
        part: the batch, or a part of it.
        batch: all of this process's batch.
        labeled_loss: cross entropy of logits and true labels.
        dropout: share of the features that the last view loses; its loss then counts as much as
            the mean of the others. 0: all views count alike.
        pseudo_loss: of logits, pseudo labels and weights.

    Source: docs/method.md, sections 4 and 9.
    """
    true, pseudo, weights = (
        maps.unbind(1) for maps in (part.labeled_label, part.view_label, part.view_weight)
    )
    masks = [*(batch.labeled_label != IGNORE).unbind(1), *(batch.view_label != IGNORE).unbind(1)]
    pixels = all_reduce_count(*masks)
    labeled_pixels, view_pixels = pixels[: len(true)], pixels[len(true) :]
    passed = torch.cat([*part.labeled_image.unbind(1), *part.view_image.unbind(1)])
    dropped = (len(part.view_image), dropout) if dropout else ()
    logits = net(passed, *dropped).logits.chunk(len(pixels))
    labeled_logits, view_logits = logits[: len(true)], logits[len(true) :]
    labeled = sum(map(labeled_loss, labeled_logits, true, labeled_pixels))
    losses = torch.stack([*map(pseudo_loss, view_logits, pseudo, weights, view_pixels)])
    unlabeled = (losses[:-1].mean() + losses[-1]) / 2 if dropout else losses.mean()
    weighed = (part.view_weight * (part.view_label != IGNORE)).sum()
    terms = {
        "unlabeled": unlabeled,
        "labeled": labeled,
        "weight": weighed / view_pixels.sum().clamp_min(1),
    }
    return Loss(unlabeled + labeled, terms)


def _new_network(stage: Stage, streams: RandomStreams, checkpoint: Path | None = None) -> nn.Module:
    """Build a network from the backbone's weights, the head at random; or from a whole network."""
    torch.manual_seed(streams.torch_seed())
    settings, info = stage.config.model, dataset_info(stage.config.dataset)
    whole = checkpoint or settings.init
    encoder = settings.pretrained if whole is None else None
    net = stage.device.place(network_of(settings, len(info.classes), encoder))
    weights = net.pretrained_from or "initialised at random"
    if whole is not None:
        weights = start_from(net, Path(whole), info.classes)
    stage.log.say(f"{stage.name}: {settings.backbone}, {weights}; images: {net.preprocessing}")
    if settings.compile:
        net.compile(dynamic=False)
    return net


class Losses(NamedTuple):
    """What the network's logits are compared with labels by."""

    labeled: LabeledLoss
    pseudo: PseudoLoss
    class_weights: Tensor | None  # (C,) of the cross entropy of true labels; None: 1


def _losses(stage: Stage, labeled: Sequence[Sample]) -> Losses:
    """Choose the losses of a training stage. Collective."""
    settings, ohem = stage.config.loss, stage.config.ohem
    weights = settings.class_weights
    if weights is not None:
        classes = dataset_info(stage.config.dataset).classes
        pixels = broadcast(count_class_pixels, labeled, len(classes))
        balanced = weights == "balanced"
        weights = balanced_weights(pixels) if balanced else scale_weights(weights, pixels)
        named = (f"{name} {weight:.3g}" for name, weight in zip(classes, weights, strict=True))
        stage.log.say(f"{stage.name}: class weights {', '.join(named)}")
        weights = torch.tensor(weights, device=stage.device.torch_device)
    entropy = partial(cross_entropy, class_weights=weights)
    if ohem is not None:
        entropy = partial(ohem_cross_entropy, **ohem.model_dump())
    pseudo = rectified_cross_entropy  # the labels reflect the weights already
    if settings.dice:
        entropy = _add(entropy, dice_loss, settings.dice)
        pseudo = _add(pseudo, rectified_dice_loss, settings.dice)
    return Losses(entropy, pseudo, weights)


def _add(loss: Callable[..., Tensor], other: Callable[..., Tensor], factor: float) -> LabeledLoss:
    return lambda *maps: loss(*maps) + factor * other(*maps)


def _querier(config: Config, splits: Splits, index: QueryIndex, read: SampleReader) -> Querier:
    rule = QueryRule.of(config.query, dataset_info(config.dataset))
    return Querier(splits.labeled, index, rule, config.augment, read)


def _score(run: Run, stage: Path, samples: Sequence[Sample]) -> Report:
    """Score a stage's network on a list. Collective."""
    classes = dataset_info(run.config.dataset).classes
    predict, loader = _open_network(run, stage, samples)
    groups = group_images([sample.name for sample in samples], run.config.dataset.groups)
    return validate(predict, loader, len(classes), groups=groups).report(classes)


def _open_network(run: Run, stage: Path, samples: Sequence[Sample]) -> tuple[Predictor, Any]:
    """Return what predicts by a stage's network, as it was validated, and the images' loader."""
    net = run.device.place(load_network(run.config, checkpoint_of(stage))).eval()
    predict = Predictor(net, run.device, run.config.inference)
    return predict, whole_images(run.config, samples, net.preprocessing)


def _keep_predictions(run: Run, val: Sequence[Sample], *stages: Path) -> None:
    """Keep the predictions of val by the networks of stages, and draw some of them."""
    folder, info = run.folder / "val", dataset_info(run.config.dataset)
    for stage in stages:
        made_from = run.digest(checkpoint_of(stage))
        opened = partial(_open_network, run, stage, val)
        keep_predictions(folder, stage.name, made_from, val, info, opened)
    names = list(dict.fromkeys(stage.name for stage in stages))
    draw_examples(run.folder / "examples.png", folder, names, val, info)


def main() -> None:
    """Read the command line and train; with ``torchrun``, as one of several processes."""
    with process_group():
        train(*read_arguments())


def read_arguments() -> tuple[Config, int | None, bool, bool]:
    """Read the command line: settings, the stage to start from, whether to start over, --verify."""
    parser = Parser(description=__doc__)
    parser.add_argument("--config", required=True, help="a YAML file, here or in configs/")
    parser.add_argument("--method", choices=METHODS, help="in place of the config's 'method:'")
    parser.add_argument(
        "settings", nargs="*", metavar="key=value", help="such as retrain.epochs=40"
    )
    again = parser.add_mutually_exclusive_group()
    again.add_argument(
        "--from-stage", type=int, choices=range(1, 7), help="redo this and later stages"
    )
    again.add_argument("--fresh", metavar="NAME", help="delete what the run NAME wrote, then start")
    parser.add_argument(
        "--verify", action="store_true", help="compare the sha256 of finished stages' files"
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
