"""What is known of each data set: class names, colours, layout, ids in mask files."""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
from torchvision.datasets import Cityscapes

from dataset.demo.objects import CLASSES as DEMO
from utils import IGNORE
from utils.config.schema import DatasetSection
from utils.errors import UserError

UNKNOWN = -1


def id_table(
    classes: Sequence[str],
    ignore: Sequence[int] = (IGNORE,),
    class_map: Mapping[int | str, int | str | None] | None = None,
) -> np.ndarray:
    """Return the meaning of each id that a mask file can hold.

    Args:
        classes: names by class id.
        ignore: ids in files that count as ignored.
        class_map: id in files to class name, class id, or None for ignored; ``other`` is all ids
            that neither names. None: the ids in files are class ids.

    Returns:
        (65536,) int16 by id in files: a class id, 255 = ignored, -1 = without meaning.

    Raises:
        UserError: ``class_map`` names no class; an id is a class and ignored.
    """
    meaning = {id_: id_ for id_ in range(len(classes))}
    if class_map is not None:
        meaning = {id_: _class_id(value, classes) for id_, value in class_map.items()}
    table = np.full(65536, meaning.pop("other", UNKNOWN), np.int16)
    for id_ in ignore:
        if meaning.get(id_, IGNORE) != IGNORE:
            raise UserError(
                f"dataset.ignore: id {id_} is class '{classes[meaning[id_]]}' too; take it off "
                "dataset.ignore, or say with dataset.class_map which ids are which class"
            )
    table[list(meaning)] = list(meaning.values())
    table[list(ignore)] = IGNORE
    return table


def _class_id(value: int | str | None, classes: Sequence[str]) -> int:
    if value is None:
        return IGNORE
    if isinstance(value, int) and value < len(classes):
        return value
    if value in classes:
        return classes.index(value)
    known = ", ".join(classes)
    raise UserError(f"dataset.class_map: {value!r} is no class; there are {known} (null: ignored)")


class Kind(NamedTuple):
    """A data set."""

    classes: tuple[str, ...]  # names by class id
    colours: tuple[tuple[int, int, int], ...]  # (red, green, blue) in 0-255 by class id
    image_pattern: str = "JPEGImages/{}.jpg"  # where the files of bare ids are below the root
    mask_pattern: str = "SegmentationClass/{}.png"
    ids: bytes | None = None  # meaning of the ids in masks, as ``id_table``; None: class ids, 255

    def palette(self) -> bytes:
        """768 bytes for PNGs of mode P; unused ids and 255 keep Pascal's colours, 255 is white."""
        colours = [*self.colours, *voc_colours(256)[len(self.colours) : 255], (255, 255, 255)]
        return bytes(channel for colour in colours for channel in colour)


@cache  # a palette is made for every mask that is written
def voc_colours(count: int) -> tuple[tuple[int, int, int], ...]:
    """Pascal VOC's colour map: the bits of the id go in turn to red, green and blue."""

    def colour(label: int) -> tuple[int, int, int]:
        channels = [0, 0, 0]
        for place in range(8):
            for channel in range(3):
                channels[channel] |= (label >> (3 * place + channel) & 1) << (7 - place)
        return (channels[0], channels[1], channels[2])

    return tuple(colour(label) for label in range(count))


_PASCAL = (
    "background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse "
    "motorbike person pottedplant sheep sofa train tvmonitor"
)
_CITYSCAPES = [each for each in Cityscapes.classes if 0 <= each.train_id < IGNORE]  # by train id
_COCO = (
    "background, person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, "
    "traffic light, fire hydrant, stop sign, parking meter, bench, bird, cat, dog, horse, sheep, "
    "cow, elephant, bear, zebra, giraffe, backpack, umbrella, handbag, tie, suitcase, frisbee, "
    "skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard, surfboard, "
    "tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, "
    "orange, broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, "
    "dining table, toilet, tv, laptop, mouse, remote, keyboard, cell phone, microwave, oven, "
    "toaster, sink, refrigerator, book, clock, vase, scissors, teddy bear, hair drier, toothbrush"
)
_CAMVID = {
    "sky": (128, 128, 128),
    "building": (128, 0, 0),
    "pole": (192, 192, 128),
    "road": (128, 64, 128),
    "pavement": (60, 40, 222),
    "tree": (128, 128, 0),
    "sign": (192, 128, 128),
    "fence": (64, 64, 128),
    "car": (64, 0, 128),
    "pedestrian": (64, 64, 0),
    "bicyclist": (0, 128, 192),
}


def _by_voc_colours(classes: tuple[str, ...]) -> Kind:
    return Kind(classes, voc_colours(len(classes)))


KINDS = {
    "pascal": _by_voc_colours(tuple(_PASCAL.split())),
    "cityscapes": Kind(
        tuple(each.name for each in _CITYSCAPES),
        tuple(each.color for each in _CITYSCAPES),
        "leftImg8bit/{}_leftImg8bit.png",
        "gtFine/{}_gtFine_labelTrainIds.png",
    ),
    "coco": Kind(
        tuple(_COCO.split(", ")),
        voc_colours(81),
        "train2017/{}.jpg",  # of training; lists name the images of val2017 by path
        "masks/{}.png",
    ),
    "camvid": Kind(tuple(_CAMVID), tuple(_CAMVID.values())),
    "demo": _by_voc_colours(DEMO),
}


def describe(section: DatasetSection) -> Kind:
    """Look up the config's data set.

    Raises:
        UserError: an unknown kind; ``classes`` missing from a custom kind, or given to another;
            ``class_map`` and ``ignore`` as in ``id_table``.
    """
    if section.kind not in (*KINDS, "custom"):
        known = ", ".join([*KINDS, "custom"])
        raise UserError(f"dataset.kind: '{section.kind}' is not one of {known}")
    if section.kind == "custom" and section.classes is None:
        raise UserError("dataset.classes: missing; a custom kind needs its class names")
    if section.kind != "custom" and section.classes is not None:
        raise UserError(
            f"dataset.classes: kind '{section.kind}' has its own; remove it, or set kind: custom"
        )
    own = section.kind == "custom"
    kind = _by_voc_colours(tuple(section.classes)) if own else KINDS[section.kind]
    if section.class_map is None and section.ignore == [IGNORE]:
        return kind
    return kind._replace(ids=id_table(kind.classes, section.ignore, section.class_map).tobytes())
