"""The bilinear resize, and its adjoint, which brings masks to the size of the features."""

import torch
import torch.nn.functional as F
from torch import Tensor


def resize(maps: Tensor, size: tuple[int, int], align_corners: bool = False) -> Tensor:
    """Resize (B, C, h, w) maps bilinearly to (B, C, H, W).

    On a CUDA device, where the gradient of ``interpolate`` is not deterministic, this is
    ``resize_by_products``. The published networks align corners, the maps of docs/method.md don't.
    """
    if maps.is_cuda:
        return resize_by_products(maps, size, align_corners)
    return F.interpolate(maps, size, mode="bilinear", align_corners=align_corners)


def resize_by_products(maps: Tensor, size: tuple[int, int], align_corners: bool) -> Tensor:
    """Resize as ``resize`` does; output and gradient are deterministic.

    The resize is separable, U(F) = R F S': two matrix products, whose gradients are matrix
    products too. They are taken in float32 (float64 stays), whatever the dtype of the maps.
    """
    with full_precision(maps):
        lines = maps.permute(0, 2, 3, 1).to(at_least_float32(maps))  # no copy if channels-last
        batch, height, width, channels = lines.shape
        rows = _resize_matrix(height, size[0], lines, align_corners)
        columns = _resize_matrix(width, size[1], lines, align_corners)
        # Columns first: the small products while there are few lines, then a large one an image.
        lines = _times(columns, lines.reshape(batch * height, width, channels))
        lines = _times(rows, lines.view(batch, height, size[1] * channels))
    return lines.view(batch, *size, channels).permute(0, 3, 1, 2).to(maps.dtype)


def pull_back(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """Apply the adjoint of the bilinear resize (h, w) -> (H, W), corners not aligned: R' M S.

    Args:
        masks: (..., H, W) float.
        size: (h, w), of the features.

    Returns:
        (..., h, w) of the masks' dtype; sums over H x W are preserved.

    Source: docs/method.md, section 1.
    """
    (height, width), (small_height, small_width) = masks.shape[-2:], size
    with full_precision(masks):
        rows = _resize_matrix(small_height, height, masks, align_corners=False)
        columns = _resize_matrix(small_width, width, masks, align_corners=False)
        return rows.T @ masks @ columns


def at_least_float32(features: Tensor) -> torch.dtype:
    """Return float64 for float64, else float32."""
    return torch.float64 if features.dtype == torch.float64 else torch.float32


def full_precision(tensor: Tensor) -> torch.autocast:
    """Switch autocast off on the tensor's device."""
    return torch.autocast(tensor.device.type, enabled=False)


def _times(matrix: Tensor, blocks: Tensor) -> Tensor:
    """Multiply each of (N, k, m) blocks by an (l, k) matrix."""
    return torch.bmm(matrix.expand(len(blocks), -1, -1), blocks)


def _resize_matrix(small: int, large: int, like: Tensor, align_corners: bool) -> Tensor:
    """(large, small): the matrix by which ``interpolate`` resizes a line, read off its columns."""
    unit = torch.eye(small, dtype=like.dtype, device=like.device).unsqueeze(0)
    return F.interpolate(unit, large, mode="linear", align_corners=align_corners)[0].T
