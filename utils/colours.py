"""Colours of classes."""

from functools import cache

import numpy as np


@cache  # a palette is made for every mask that is written
def voc_colours(count: int) -> tuple[tuple[int, int, int], ...]:
    """Pascal VOC's colour map: the bits of the id go in turn to red, green and blue."""
    bits = np.unpackbits(np.arange(count, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    places = np.pad(bits, ((0, 0), (0, 1))).reshape(count, 3, 3)  # by id, place and channel
    colours = (places * np.array([128, 64, 32], np.uint8)[:, None]).sum(axis=1)
    return tuple(map(tuple, colours.tolist()))
