"""How long an epoch is, and whether batches fit into it."""

from collections.abc import Sequence

from dataset.selection import count_kept
from dataset.splits import Sample, Splits
from utils.config import Config, SupervisedSection
from utils.distributed import world
from utils.errors import UserError


def repeats(settings: SupervisedSection, labeled: Sequence[Sample]) -> int:
    """Tell how often stage 1 passes the labeled list an epoch."""
    return 2 if len(labeled) < settings.repeat_below else 1


def refuse_batch_sizes(config: Config, splits: Splits) -> None:
    """Check the sizes of batches before anything trains.

    Raises:
        UserError: a batch is larger than an epoch, has no image for a process, or cannot be cut
            into equal parts.
    """
    labeled = len(splits.labeled) * repeats(config.supervised, splits.labeled)
    reliable = count_kept(len(splits.unlabeled), config.select.keep)
    for key, settings, samples in (
        ("supervised", config.supervised, labeled),
        ("retrain", config.retrain, reliable),
    ):
        size, cuts = settings.batch_size, settings.accumulate
        if size > samples:
            raise UserError(
                f"{key}.batch_size: {size} is larger than the {samples} samples of an epoch; "
                "lower it"
            )
        if size < world():
            raise UserError(f"{key}.batch_size: {size} is less than {world()} processes; raise it")
        if cuts > 1 and size % (cuts * world()):
            raise UserError(
                f"{key}.accumulate: {cuts} does not cut the {size} images of a batch evenly for "
                f"{world()} processes; change it or {key}.batch_size"
            )
