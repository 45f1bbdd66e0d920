"""The adjoint of the bilinear resize, by which regions meet features at the features' size."""

import torch
import torch.nn.functional as F
from torch import Tensor


def pull_back(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """Apply the adjoint of the bilinear resize (h, w) -> (H, W), corners not aligned.

    The resize is separable, U(F) = R F S', so its adjoint is R' M S: two small matrix products,
    deterministic on every device, which the backward of ``interpolate`` is not.

    Args:
        masks: (..., H, W) float.
        size: (h, w), of the features.

    Returns:
        (..., h, w) of the masks' dtype; sums over H x W stay what they were.

    Source: METHOD piece 1.
    """
    (height, width), (small_height, small_width) = masks.shape[-2:], size
    with full_precision(masks):
        rows = _resize_matrix(small_height, height, masks)
        columns = _resize_matrix(small_width, width, masks)
        return rows.T @ masks @ columns


def at_least_float32(features: Tensor) -> torch.dtype:
    """Return float64 for float64, else float32."""
    return torch.float64 if features.dtype == torch.float64 else torch.float32


def full_precision(tensor: Tensor) -> torch.autocast:
    """Switch autocast off on the tensor's device."""
    return torch.autocast(tensor.device.type, enabled=False)


def _resize_matrix(small: int, large: int, like: Tensor) -> Tensor:
    """(large, small): the matrix by which ``interpolate`` resizes a line, read off its columns."""
    unit = torch.eye(small, dtype=like.dtype, device=like.device).unsqueeze(0)
    return F.interpolate(unit, large, mode="linear", align_corners=False)[0].T
