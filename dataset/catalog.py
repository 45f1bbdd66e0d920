"""What is known of each data set: class names, colours, layout, ids in mask files."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from torchvision.datasets import Cityscapes
from torchvision.models.detection import MaskRCNN_ResNet50_FPN_Weights
from torchvision.models.segmentation import DeepLabV3_ResNet50_Weights

from dataset.demo.objects import CLASSES as DEMO
from dataset.reading import AS_STORED, COLOURS, IDS, Pixels
from utils import IGNORE
from utils.colours import voc_colours
from utils.config.schema import DatasetSection
from utils.errors import UserError

UNKNOWN = -1


def id_table(
    classes: Sequence[str],
    ignore: Sequence[int] = (IGNORE,),
    class_map: Mapping[int | str, int | str | None] | None = None,
) -> np.ndarray:
    """Return the meaning of each id, or of each colour, that a mask file can hold.

    Args:
        classes: names by class id.
        ignore: ids in files that count as ignored; without effect on colours.
        class_map: id in files, or colour such as ``#ff0000``, to class name, class id, or None for
            ignored; ``other`` is all that neither names. None: the ids in files are class ids.

    Returns:
        int16 class ids, 255 = ignored, -1 = without meaning: (65536,) by id in files or, where
        ``class_map`` has colours, (16777216,) by 0xRRGGBB.

    Raises:
        UserError: ``class_map`` names no class, or has ids and colours; an id is a class and
            ignored.
    """
    meaning = {id_: id_ for id_ in range(len(classes))}
    if class_map is not None:
        meaning = {id_: _class_id(value, classes) for id_, value in class_map.items()}
    other = meaning.pop("other", UNKNOWN)
    colours = {int(key[1:], 16): label for key, label in meaning.items() if isinstance(key, str)}
    if colours and len(colours) < len(meaning):
        raise UserError(
            "dataset.class_map: has ids and colours; name the colours alone ('#010101' is grey 1)"
        )
    table = np.full(COLOURS if colours else IDS, other, np.int16)
    if colours:
        table[list(colours)] = list(colours.values())
        return table
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


class DatasetInfo(NamedTuple):
    """A data set."""

    classes: tuple[str, ...]  # names by class id
    colours: tuple[tuple[int, int, int], ...]  # (red, green, blue) in 0-255 by class id
    image_pattern: str = "JPEGImages/{}.jpg"  # where the files of bare ids are below the root
    mask_pattern: str = "SegmentationClass/{}.png"
    ids: bytes | None = None  # meaning of what masks hold, as ``id_table``; None: class ids, 255
    own: bool = False  # whether the config names the classes
    pixels: Pixels = AS_STORED  # how picture files are read

    def files_of(self, name: str) -> tuple[str, str]:
        """Return where the image and the mask of a bare id are, relative to the root."""
        return self.image_pattern.format(name), self.mask_pattern.format(name)

    def table(self) -> np.ndarray:
        """Return the meaning of the ids in masks, as ``id_table``."""
        return id_table(self.classes) if self.ids is None else np.frombuffer(self.ids, np.int16)

    def spell(self, id_: int) -> str:
        """Spell an id in mask files as ``class_map`` does: a number, or a colour in quotes."""
        return f"'#{id_:06x}'" if len(self.ids or b"") > 2 * IDS else str(id_)

    def palette(self) -> bytes:
        """768 bytes for PNGs of mode P; unused ids and 255 keep Pascal's colours, 255 is white."""
        colours = [*self.colours, *voc_colours(256)[len(self.colours) : 255], (255, 255, 255)]
        return bytes(channel for colour in colours for channel in colour)


_PASCAL = DeepLabV3_ResNet50_Weights.COCO_WITH_VOC_LABELS_V1.meta["categories"][1:]
_CITYSCAPES = [each for each in Cityscapes.classes if 0 <= each.train_id < IGNORE]  # by train id
# By ascending id; torchvision writes N/A where COCO has none.
_COCO = [x for x in MaskRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"][1:] if x != "N/A"]
_CAMVID = (
    "sky 808080 building 800000 pole c0c080 road 804080 pavement 3c28de tree 808000 sign c08080 "
    "fence 404080 car 400080 pedestrian 404000 bicyclist 0080c0"
)  # each with its colour


def _by_voc_colours(classes: tuple[str, ...], own: bool = False) -> DatasetInfo:
    return DatasetInfo(classes, voc_colours(len(classes)), own=own)


KINDS = {
    "pascal": _by_voc_colours(("background", *_PASCAL)),
    "cityscapes": DatasetInfo(
        tuple(each.name for each in _CITYSCAPES),
        tuple(each.color for each in _CITYSCAPES),
        "leftImg8bit/{}_leftImg8bit.png",
        "gtFine/{}_gtFine_labelTrainIds.png",
    ),
    "coco": DatasetInfo(
        ("background", *_COCO),
        voc_colours(81),
        "train2017/{}.jpg",  # of training; lists name the images of val2017 by path
        "masks/{}.png",
    ),
    "camvid": DatasetInfo(
        tuple(_CAMVID.split()[::2]),
        tuple(tuple(bytes.fromhex(colour)) for colour in _CAMVID.split()[1::2]),
    ),
    "demo": _by_voc_colours(DEMO),
}


def dataset_info(section: DatasetSection) -> DatasetInfo:
    """Look up the config's data set.

    Raises:
        UserError: an unknown kind; ``classes`` missing from a custom kind, or given to another;
            ``class_map`` and ``ignore`` as in ``id_table``.
    """
    name, custom = section.kind, section.kind == "custom"
    if not custom and name not in KINDS:
        raise UserError(f"dataset.kind: '{name}' is not one of {', '.join(KINDS)}, custom")
    if custom and section.classes is None:
        raise UserError("dataset.classes: missing; a custom kind needs its class names")
    if not custom and section.classes is not None:
        raise UserError(
            f"dataset.classes: kind '{name}' has its own; remove it, or set kind: custom"
        )
    kind = _by_voc_colours(tuple(section.classes), own=True) if custom else KINDS[name]
    kind = kind._replace(pixels=Pixels(section.bands, section.range))
    if section.class_map is None and section.ignore == [IGNORE]:
        return kind
    return kind._replace(ids=id_table(kind.classes, section.ignore, section.class_map).tobytes())
