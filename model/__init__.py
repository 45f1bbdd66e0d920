"""The networks, the losses and the mathematics of CISC-R; a trained network as a function."""

import model.imports  # noqa: F401 - first: says what hides this project's modules
from model.networks import BACKBONES, NETWORKS, STEMS, build_model, largest_stride, network_of
from model.networks.timm_encoders import patch_size_of, preprocessing_of, refuse_crop
from model.networks.weights import start_from
from model.ops.layers import SegmentationOutput
from model.segmenter import Segmenter

__all__ = [
    "BACKBONES",
    "NETWORKS",
    "STEMS",
    "SegmentationOutput",
    "Segmenter",
    "build_model",
    "largest_stride",
    "network_of",
    "patch_size_of",
    "preprocessing_of",
    "refuse_crop",
    "start_from",
]
