"""Train a segmentation network on few labels and many images: the six stages of CISC-R.

python train.py --config pascal.yaml [section.key=value ...] [--from-stage N | --fresh NAME]
"""

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

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
    with_pseudo_masks,
)
from dataset.loader import Chance, batch_keys, batch_seeds, training_batches, whole_images
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
    Queried,
    RetrainSamples,
    queried_image,
    queried_prototype,
    refuse_batch_sizes,
    repeats,
)
from eval import build_network, draw_examples, predictor, report, validate, whole_batches
from model.cisc import class_prototypes, image_reliability, reliability
from model.objectives import (
    Guide,
    Loss,
    labeled_loss_of,
    retrain_loss,
    supervised_loss,
    weight_by_bank,
    weight_by_image,
)
from model.ops.frozen import frozen
from model.training_step import training_step
from utils.batch_norm import synchronised
from utils.checkpoint import load_weights
from utils.config.reading import read_config
from utils.config.schema import Config, TrainingSection
from utils.distributed import by_first, gathered, joined, merged, parallel, shared
from utils.errors import Parser, UserError, exit_with_one_line
from utils.optimization import Optimization
from utils.outcomes import Outcomes
from utils.panels import save_mask
from utils.progress import StageBar
from utils.run.resume import Journal, Progress
from utils.run.stages import Report, Run, Stage, checkpoint_of
from utils.spill import Spill


def train(config: Config, from_stage: int | None = None, fresh: bool = False) -> None:
    """Run the six stages, or those that are left of them."""
    kind, splits = describe(config.dataset), read_splits(config.dataset)
    refuse_batch_sizes(config, splits)
    index = build_query_index(splits.labeled, QueryRule.of(config.query, kind))
    with Run(config, from_stage, fresh, splits.digests()) as run:
        first = run.stage("1_supervised", train_supervised, splits, index)
        masks = run.stage("2_pseudo_label", write_pseudo_labels, first, splits.unlabeled)
        chosen = run.stage("3_select", select, first, splits, masks, index)
        reliable, unreliable, index = read_selection(chosen, splits.unlabeled, kind.classes)
        pseudo_labeled = with_pseudo_masks(reliable, masks / "masks")
        second = run.stage("4_retrain", retrain, splits, pseudo_labeled, first, index)
        masks = run.stage("5_relabel", write_pseudo_labels, second, unreliable)
        pseudo_labeled += with_pseudo_masks(unreliable, masks / "masks")
        final = run.stage("6_retrain", retrain, splits, pseudo_labeled, second, index)
        draw_examples(run.folder / "examples.png", splits.val, config, run.device, first, final)
        run.finish()


def train_supervised(stage: Stage, splits: Splits, index: QueryIndex) -> Report:
    """Stage 1: labeled pairs, cross entropy on both images and the consistency loss."""
    config, chance = stage.config, Chance(stage.config.seed, stage.name)
    read = sample_reader(config.cache, splits.labeled, config.workers)
    querier = _querier(config, splits, index, read)
    repeat = repeats(config.supervised, splits.labeled)
    pairs = LabeledPairs(splits.labeled, querier, config.augment, chance, repeat, read)
    net = _new_network(stage, chance)
    weight = config.supervised.consistency
    loss = partial(supervised_loss, parallel(net), labeled_loss_of(config.ohem), weight)
    return fit(stage, net, loss, pairs, config.supervised, splits.val)


@torch.inference_mode()
def write_pseudo_labels(stage: Stage, teacher: Path, unlabeled: Sequence[Sample]) -> Report:
    """Stages 2 and 5: the teacher's most probable class of every pixel, as palette PNGs."""
    settings, palette = stage.config.pseudo_label, describe(stage.config.dataset).palette()
    net = _teacher(stage, teacher)
    predict = predictor(net, stage.device, stage.config.inference, settings)
    journal = Journal(stage)
    done = shared(journal.read)

    def keep(samples: Sequence[Sample], masks: Any, means: Sequence[float]) -> dict[str, float]:
        files = [mask_file(stage.folder / "masks", sample) for sample in samples]
        for file, mask in zip(files, masks, strict=True):
            save_mask(file, mask, palette)
        return journal.add([sample.name for sample in samples], files, means)

    load = partial(whole_images, done=frozenset(done))
    with ThreadPoolExecutor(1) as writer:  # a batch is written while the next one is predicted
        kept = []
        for chosen, batch in whole_batches(unlabeled, stage.config, stage.device, stage.name, load):
            probabilities, ids = predict(batch.image, tuple(batch.label.shape[-2:])).max(dim=1)
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

    sums: list[Tensor] = []  # of each batch, (C, D + 1): prototypes and how many there are
    kept = Spill(stage.unfinished / "features", stage.device.device)
    for chosen, features, label in passed(splits.labeled, "labeled"):
        prototypes, present = class_prototypes(features, label, len(classes))
        sums.append(torch.cat([prototypes, present.unsqueeze(2)], dim=2).sum(dim=0).cpu())
        kept.add([sample.name for sample in chosen], features, label)
    summed = torch.stack(gathered(sums)).sum(dim=0).to(stage.device.device)
    anchors = summed[:, :-1] / summed[:, -1:]  # NaN, 0 / 0, for a class that no label shows

    guides: list[dict[tuple[int, str], float]] = []  # of each batch, as are images
    for names, features, label in kept:
        rows = zip(names, reliability(features, label, anchors).tolist(), strict=True)
        scores = {(c, name): x for name, row in rows for c, x in enumerate(row)}
        guides.append({key: score for key, score in scores.items() if math.isfinite(score)})
    images: list[dict[str, float]] = []
    pseudo_labeled = with_pseudo_masks(splits.unlabeled, masks / "masks")
    for chosen, features, label in passed(pseudo_labeled, "unlabeled"):
        scores = image_reliability(reliability(features, label, anchors), settings.score == "mean")
        images.append(dict(zip((s.name for s in chosen), scores.tolist(), strict=True)))
    by_name = merged(images)
    scored = {sample.name: by_name[sample.name] for sample in splits.unlabeled}, merged(guides)
    reliable = shared(write_selection, stage.folder, *scored, index, settings.keep, classes)
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
    loss = partial(retrain_loss, parallel(net), guide, labeled_loss_of(config.ohem))
    outcome = fit(stage, net, loss, samples, config.retrain, splits.val)
    return {"images": len(samples), **outcome}


def fit(
    stage: Stage,
    net: nn.Module,
    loss: Callable[[Any, Any], Loss],
    dataset: LabeledPairs | RetrainSamples,
    settings: TrainingSection,
    val: Sequence[Sample],
) -> Report:
    """The one training loop; writes ``checkpoint.pth``, and goes on where it was stopped."""
    config, device, size = stage.config, stage.device, settings.batch_size
    chance, steps = Chance(config.seed, stage.name), len(dataset) // size
    skip, iterations = config.on_nonfinite == "skip", steps * settings.epochs
    optimization = Optimization(net, config.optimizer, iterations, device.scaler(), undo=skip)
    best = config.evaluate.checkpoint == "best"
    bar = StageBar(stage.name, settings.epochs, steps, images=2 * size)

    def leave_out(epoch: int, step: int, loss: float) -> None:
        keys = batch_keys(len(dataset), size, epoch, step, chance)
        stage.refuse_not_finite(epoch, step, loss, dataset.names(keys))

    outcomes = Outcomes(leave_out)
    with bar, Progress(stage, net, optimization, bar) as at:
        epochs, outcome = range(at.epoch, settings.epochs), at.report
        batches = training_batches(dataset, size, epochs, chance, config.workers, at.step)
        seeds = batch_seeds(len(dataset), size, epochs, chance, at.step)
        for epoch in epochs:
            net.train()
            bar.start(epoch, at.seen)
            for step in range(at.step, steps):
                batch, rate = device.move(next(batches)), optimization.lr
                shown, stepped = training_step(
                    net, loss, optimization, device, batch, next(seeds), settings.accumulate
                )
                bar.update(shown, stepped.finite, rate)
                outcomes.add(epoch, step, stepped)
                at.step_done()
            outcomes.settle()
            numbers, last = bar.means(), epoch + 1 == settings.epochs
            if last or (epoch + 1) % config.evaluate.every == 0:
                matrix = validate(net, val, config, device)
                numbers["miou"] = matrix.mean_iou()
                if numbers["miou"] > outcome.get("miou", -1.0) if best else last:
                    outcome = {**numbers, **report(matrix, config), "epoch": epoch + 1}
                    stage.save(net, epoch + 1)
            stage.record(epoch + 1, numbers)
            at.epoch_done(outcome)
    return outcome


def _new_network(stage: Stage, chance: Chance) -> nn.Module:
    """Build a network from the backbone's weights and the stage's random numbers."""
    torch.manual_seed(chance.torch_seed())
    net = synchronised(
        stage.device.place(build_network(stage.config, stage.config.model.pretrained))
    )
    if stage.config.model.compile:
        net.compile(dynamic=False)
    return net


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
    rows: list[dict[str, Tensor]] = []  # of each batch
    title = f"{stage.name} prototypes"
    for chosen, batch in whole_batches(labeled, stage.config, stage.device, title):
        with stage.device.autocast():
            features = teacher.extract(batch.image)
        prototypes, _ = class_prototypes(features, batch.label, num_classes)
        rows.append(dict(zip((sample.name for sample in chosen), prototypes.cpu(), strict=True)))
    bank = merged(rows)
    return torch.stack([bank[sample.name] for sample in labeled]).to(stage.device.device)


def _querier(config: Config, splits: Splits, index: QueryIndex, read: SampleReader) -> Querier:
    rule = QueryRule.of(config.query, describe(config.dataset))
    return Querier(splits.labeled, index, rule, config.augment, read)


def main() -> None:
    """Read the command line and train; with ``torchrun``, as one of several processes."""
    with joined():
        train(*read_arguments())


def read_arguments() -> tuple[Config, int | None, bool]:
    """Read the command line: settings, the stage to start over from, whether to start afresh."""
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", required=True, help="a YAML file, here or in configs/")
    parser.add_argument(
        "settings", nargs="*", metavar="key=value", help="such as retrain.epochs=40"
    )
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--from-stage", type=int, choices=range(1, 7), help="do it and later again")
    again.add_argument("--fresh", metavar="NAME", help="remove all that the run of this name made")
    arguments = parser.parse_intermixed_args()
    config = read_config(arguments.config, arguments.settings)
    if arguments.fresh not in (None, config.name):
        raise UserError(f"--fresh: this run is called '{config.name}', not '{arguments.fresh}'")
    return config, arguments.from_stage, arguments.fresh is not None


if __name__ == "__main__":
    exit_with_one_line(main)
