"""How many samples an epoch has, and whether the batches of a config fit."""

import math

from utils.config.schema import Config, SupervisedSection, TrainingSection
from utils.distributed import world
from utils.errors import UserError


def count_iterations(settings: TrainingSection, samples: int) -> int:
    """Return how often a stage updates the weights, with so many samples an epoch."""
    return settings.iterations or samples // settings.batch_size * settings.epochs


def count_samples(settings: SupervisedSection, labeled: int) -> int:
    """Return how many samples an epoch of stage 1 has, with so many labeled images."""
    return labeled * count_repeats(settings, labeled)


def count_repeats(settings: SupervisedSection, labeled: int) -> int:
    """Return how often an epoch of stage 1 passes a list of so many labeled images."""
    return 2 if labeled < settings.repeat_below else 1


def count_kept(count: int, keep: float) -> int:
    """Return how many of ``count`` a share keeps, rounded up."""
    return math.ceil(round(count * keep, 9))  # 100 * 0.07 is a little more than 7


def refuse_batch_sizes(config: Config, labeled: int, unlabeled: int) -> None:
    """Compare the batches of a config with the lengths of its lists.

    Raises:
        UserError: a batch exceeds an epoch, or is no equal share for each process.
    """
    labeled = count_samples(config.supervised, labeled)
    unlabeled = count_kept(unlabeled, config.select.keep) if 3 in config.stages else unlabeled
    mixed = 6 in config.stages and config.retrain.mix == "unlabeled"
    if mixed and config.retrain.batch_size < 2 * world():
        raise UserError(
            f"retrain.batch_size: {config.retrain.batch_size} gives {world()} processes less than "
            "two images each, which retrain.mix=unlabeled mixes; raise it, or set retrain.mix=none"
        )
    epochs = [("supervised", labeled), ("retrain", unlabeled)]
    for key, samples in epochs[: 1 + (6 in config.stages)]:
        size, cuts = getattr(config, key).batch_size, getattr(config, key).accumulate
        name = f"{key}.batch_size: {size}"
        if size > samples:
            mend = "lower it" if samples > 1 else "give it a list of more images"
            raise UserError(f"{name} is larger than the {samples} samples of an epoch; {mend}")
        if size < world():
            raise UserError(f"{name} is less than {world()} processes; raise it")
        if cuts > 1 and size % (cuts * world()):
            raise UserError(
                f"{key}.accumulate: {cuts} does not cut the {size} images of a batch evenly for "
                f"{world()} processes; change it or {key}.batch_size"
            )
