"""What stages 2 and 5 keep of each image beside its mask: confidence, doubt by class, features.

``python -m dataset.splits suggest`` reads it and says which images to label next.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypedDict

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from model.cisc.pseudo_labels import Opinions
from utils.distributed import on_rank_zero
from utils.files import write_atomically, write_csv
from utils.run.stages import Report


class ImageSummary(TypedDict):
    """What is kept of an image, as JSON."""

    confidence: float  # mean probability of the pixels' most probable classes
    doubt: list[float]  # by class, in [0, 1], as ``doubt_by_class``
    features: str  # (D,) float16 of length 1, little-endian, in base64


def doubt_by_class(opinions: Opinions) -> Tensor:
    """Return how far teacher and votes disagree on each class: (B, C) float in [0, 1].

    The mean over the pixels of the difference of both probabilities. Without votes, of 2 p (1 - p):
    the expected difference of the teacher's probability p to a class drawn by it.
    """
    teacher, votes = opinions.teacher, opinions.votes
    differences = 2 * teacher * (1 - teacher) if votes is None else (teacher - votes).abs()
    return differences.mean(dim=(2, 3))


def summarize(opinions: Opinions) -> list[ImageSummary]:
    """Summarise the opinions on each image of a batch.

    Features are those of the voter, or without votes the mean probabilities of the classes.
    """
    confidence = opinions.both.amax(dim=1).mean(dim=(1, 2)).unsqueeze(1)
    doubt, features = doubt_by_class(opinions), opinions.features
    features = opinions.both.mean(dim=(2, 3)) if features is None else features
    columns = confidence, doubt, F.normalize(features.float(), dim=1)
    rows = torch.cat(columns, dim=1).cpu().numpy()  # the CPU waits once
    classes = doubt.shape[1]
    return [
        {
            "confidence": float(row[0]),
            "doubt": [round(float(value), 6) for value in row[1 : classes + 1]],
            "features": base64.b64encode(row[classes + 1 :].astype("<f2").tobytes()).decode(),
        }
        for row in rows
    ]


def write_summaries(
    folder: Path,
    classes: Sequence[str],
    images: Mapping[str, ImageSummary],
    labeled: Mapping[str, ImageSummary],
) -> Report:
    """Write ``confidence.csv``, ``doubt.csv`` and ``features.npz`` of a labeling stage.

    Args:
        folder: of the stage.
        classes: names by class id.
        images: summaries by image name, in the order of the files.
        labeled: of labeled images, whose features are kept, after the others.

    Returns:
        The number of images and their mean confidence.
    """
    confidences = [(name, found["confidence"]) for name, found in images.items()]
    on_rank_zero(write_csv)(folder / "confidence.csv", ("image", "confidence"), confidences)
    doubts = ((name, *found["doubt"]) for name, found in images.items())
    on_rank_zero(write_csv)(folder / "doubt.csv", ("image", *classes), doubts)
    seen = images | labeled
    vectors = [np.frombuffer(base64.b64decode(x["features"]), "<f2") for x in seen.values()]
    arrays = {"images": np.array([*seen], str), "features": np.array(vectors)}
    content = io.BytesIO()
    np.savez(content, **arrays)
    write = on_rank_zero(write_atomically)
    write(folder / "features.npz", lambda path: path.write_bytes(content.getvalue()))
    mean = sum(confidence for _, confidence in confidences) / max(1, len(images))
    return {"images": len(images), "confidence": mean}
