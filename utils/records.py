"""Batches: what the data hands to the networks, and nothing but tensors."""

from typing import NamedTuple, TypeVar

from torch import Tensor

Record = TypeVar("Record", bound=tuple)


class QueryPair(NamedTuple):
    """An image and the labeled image queried for it. A batch adds a first dimension.

    Attributes:
        image: (3, H, W) float, normalised.
        label: (H, W) long, true or pseudo, 255 = ignored.
        query_image: (3, H, W) float, normalised.
        query_label: (H, W) long, true.
        shared_class: class id, 255 if the pair shares none.
    """

    image: Tensor
    label: Tensor
    query_image: Tensor
    query_label: Tensor
    shared_class: Tensor | int


class QueriedImage(NamedTuple):
    """The labeled image queried for another, as a teacher sees it. A batch adds a first dimension.

    Attributes:
        shared_class: class id, 255 if the two share none.
        image: (3, H, W) float, normalised, aimed at the shared class.
        label: (H, W) long, true.
    """

    shared_class: Tensor | int
    image: Tensor
    label: Tensor


class QueriedPrototype(NamedTuple):
    """Which labeled image is queried for another, where a bank keeps its prototypes.

    Attributes:
        shared_class: class id, 255 if the two share none.
        position: of the queried image in the labeled list.
    """

    shared_class: Tensor | int
    position: Tensor | int


Queried = QueriedImage | QueriedPrototype


class RetrainSample(NamedTuple):
    """What a retraining step needs of an unlabeled image. A batch adds a first dimension.

    Attributes:
        image: (3, H, W) float, normalised, as the teacher sees it.
        pseudo_label: (H, W) long, 255 = ignored.
        student_image: (3, H, W) float, normalised, the same crop in strong colours.
        labeled_image: (3, H, W) float, normalised, of another labeled image.
        labeled_label: (H, W) long, true.
        queried: what guides the pseudo label.
    """

    image: Tensor
    pseudo_label: Tensor
    student_image: Tensor
    labeled_image: Tensor
    labeled_label: Tensor
    queried: Queried


class WholeImage(NamedTuple):
    """An image as inference takes it. A batch adds a first dimension.

    Attributes:
        image: (3, h, w) float, normalised, shrunk to ``long_side`` if there is one.
        label: (H, W) long at the file's own size, 255 everywhere if the sample has no mask.
        index: position in the list.
    """

    image: Tensor
    label: Tensor
    index: Tensor | int


def parts(batch: Record, count: int) -> list[Record]:
    """Cut a batch into parts along the first dimension of its tensors.

    Args:
        batch: a record of tensors and records.
        count: parts; alike in size where it divides the batch.
    """
    columns = [parts(x, count) if isinstance(x, tuple) else x.chunk(count) for x in batch]
    return [type(batch)._make(row) for row in zip(*columns, strict=True)]
