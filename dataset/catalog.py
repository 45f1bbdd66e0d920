"""What is known of each data set before looking at a file: class names, palette, layout."""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np

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
    """Tell what each id that a mask file can hold means.

    Args:
        classes: names by class id.
        ignore: ids in files that count as ignored.
        class_map: id in files to class name, class id, or None for ignored; ``other`` stands for
            the ids that neither names. None: the ids in files are class ids.

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
    """A data set.

    Attributes:
        classes: names by class id.
        colours: (red, green, blue) in 0-255 by class id.
        image_pattern, mask_pattern: where U2PL's bare ids lie below the root.
        ids: what ids in mask files mean, the bytes of ``id_table``; None: class ids, and 255.
    """

    classes: tuple[str, ...]
    colours: tuple[tuple[int, int, int], ...]
    image_pattern: str = "JPEGImages/{}.jpg"
    mask_pattern: str = "SegmentationClass/{}.png"
    ids: bytes | None = None

    def palette(self) -> bytes:
        """768 bytes for PNGs of mode P; unused ids and 255 keep Pascal's colours, 255 is white."""
        colours = [*self.colours, *voc_colours(256)[len(self.colours) : 255], (255, 255, 255)]
        return bytes(channel for colour in colours for channel in colour)


@cache  # a palette is made for every mask that is written
def voc_colours(count: int) -> tuple[tuple[int, int, int], ...]:
    """Pascal VOC's colour map: the bits of the id, dealt in turn to red, green and blue."""

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
_CITYSCAPES = {
    "road": (128, 64, 128),
    "sidewalk": (244, 35, 232),
    "building": (70, 70, 70),
    "wall": (102, 102, 156),
    "fence": (190, 153, 153),
    "pole": (153, 153, 153),
    "traffic light": (250, 170, 30),
    "traffic sign": (220, 220, 0),
    "vegetation": (107, 142, 35),
    "terrain": (152, 251, 152),
    "sky": (70, 130, 180),
    "person": (220, 20, 60),
    "rider": (255, 0, 0),
    "car": (0, 0, 142),
    "truck": (0, 0, 70),
    "bus": (0, 60, 100),
    "train": (0, 80, 100),
    "motorcycle": (0, 0, 230),
    "bicycle": (119, 11, 32),
}
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
        tuple(_CITYSCAPES),
        tuple(_CITYSCAPES.values()),
        "leftImg8bit/{}_leftImg8bit.png",
        "gtFine/{}_gtFine_labelTrainIds.png",
    ),
    "coco": Kind(
        tuple(_COCO.split(", ")),
        voc_colours(81),
        "train2017/{}.jpg",  # images of val stand in lists with their path
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
    kind = _named(section)
    if section.class_map is None and section.ignore == [IGNORE]:
        return kind
    return kind._replace(ids=id_table(kind.classes, section.ignore, section.class_map).tobytes())


def _named(section: DatasetSection) -> Kind:
    if section.kind == "custom":
        if section.classes is None:
            raise UserError("dataset.classes: missing; a custom kind needs its class names")
        return _by_voc_colours(tuple(section.classes))
    if section.kind not in KINDS:
        known = ", ".join([*KINDS, "custom"])
        raise UserError(f"dataset.kind: '{section.kind}' is not one of {known}")
    if section.classes is not None:
        raise UserError(
            f"dataset.classes: kind '{section.kind}' has its own; remove it, or set kind: custom"
        )
    return KINDS[section.kind]
