"""What stages 2 and 5 keep of each image: confidence, doubt by class; stage 2 also features.

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
    """Summarise the opinions on each image of a batch."""
    confidence = opinions.both.amax(dim=1).mean(dim=(1, 2)).unsqueeze(1)
    rows = torch.cat([confidence, doubt_by_class(opinions)], dim=1).tolist()
    return [
        {"confidence": mean, "doubt": [round(value, 6) for value in doubt], "features": features}
        for (mean, *doubt), features in zip(rows, encode(opinions.features), strict=True)
    ]


def encode(features: Tensor) -> list[str]:
    """Return (B, D) features as JSON keeps them: of length 1, float16, in base64."""
    rows = F.normalize(features.float(), dim=1).cpu().numpy().astype("<f2")
    return [base64.b64encode(row.tobytes()).decode() for row in rows]


def write_summaries(
    folder: Path, classes: Sequence[str], images: Mapping[str, ImageSummary]
) -> Report:
    """Write ``confidence.csv`` and ``doubt.csv`` of a labeling stage.

    Args:
        folder: of the stage.
        classes: names by class id.
        images: summaries by image name, in the order of the files.

    Returns:
        The number of images and their mean confidence.
    """
    confidences = [(name, found["confidence"]) for name, found in images.items()]
    on_rank_zero(write_csv)(folder / "confidence.csv", ("image", "confidence"), confidences)
    doubts = ((name, *found["doubt"]) for name, found in images.items())
    on_rank_zero(write_csv)(folder / "doubt.csv", ("image", *classes), doubts)
    mean = sum(confidence for _, confidence in confidences) / max(1, len(images))
    return {"images": len(images), "confidence": mean}


def write_features(folder: Path, features: Mapping[str, str]) -> None:
    """Write ``features.npz``: what ``encode`` returns, by image name."""
    vectors = [np.frombuffer(base64.b64decode(row), "<f2") for row in features.values()]
    content = io.BytesIO()
    np.savez(content, images=np.array([*features], str), features=np.array(vectors))
    write = on_rank_zero(write_atomically)
    write(folder / "features.npz", lambda path: path.write_bytes(content.getvalue()))
