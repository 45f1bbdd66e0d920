"""Lists of images: read them, check them, make them, and take in those of other projects."""

from dataset.splits.lines import read_list
from dataset.splits.lists import Splits, check_masks, read_splits, read_val
from dataset.splits.samples import (
    Sample,
    SampleReader,
    find_pictures,
    mask_file,
    pick,
    read_label,
    read_sample,
    with_pseudo_masks,
)

__all__ = [
    "Sample",
    "SampleReader",
    "Splits",
    "check_masks",
    "find_pictures",
    "mask_file",
    "pick",
    "read_label",
    "read_list",
    "read_sample",
    "read_splits",
    "read_val",
    "with_pseudo_masks",
]
