"""Encoders of timm: any network with a map at stride 4, and plain vision transformers."""

from difflib import get_close_matches
from functools import cache

import timm
import torch
import torch.nn.functional as F
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from model.networks.weights import LITE_NAMES
from model.ops.dilated import DilatedDepthwiseConv2d
from model.ops.layers import cut
from utils import IMAGENET, Preprocessing
from utils.checkpoint import Weights
from utils.errors import UserError

# What timm raises for a network that has no maps, or does not know ``output_stride``.
_REFUSALS = (AssertionError, NotImplementedError, RuntimeError, TypeError, ValueError)
_LITE_PREPROCESSING = Preprocessing((127 / 255,) * 3, (128 / 255,) * 3, "bicubic")


class TimmEncoder(nn.Module):
    """A convolutional (or hierarchical) network of timm's as an encoder.

    Args:
        name: timm's, with or without a tag: ``convnext_tiny``, ``resnet50.a1_in1k``.
        output_stride: input size over size of the last map; networks that cannot dilate have one.

    Attributes:
        channels: channels of the stride-4 map and of the last one.

    Raises:
        UserError: a network without a map at stride 4, or that does not reach the output stride.
    """

    def __init__(self, name: str, output_stride: int) -> None:
        super().__init__()
        with torch.device("meta"):
            shape = _pyramid(name, output_stride).eval()
        info = shape.feature_info
        strides, channels = info.reduction(), info.channels()
        if 4 not in strides:
            raise UserError(
                f"model.backbone: timm/{name} has no map at stride 4 (it has {strides}); take a "
                "convolutional network, or model.name=dpt with a plain vision transformer"
            )
        if strides[-1] != output_stride:
            raise UserError(
                f"model.output_stride: timm/{name} ends at stride {strides[-1]}, not at "
                f"{output_stride}; set model.output_stride={strides[-1]}"
            )
        low = len(strides) - 1 - strides[::-1].index(4)
        places = [info.out_indices[low], info.out_indices[-1]]
        self.net = _pyramid(name, output_stride, out_indices=places)
        for place, module in list(self.net.named_modules()):
            if DilatedDepthwiseConv2d.can_replace(module):
                self.net.set_submodule(place, DilatedDepthwiseConv2d.of(module))
        self.output_stride = output_stride
        self.channels = (channels[low], channels[-1])
        self.pad = not _rounds_up(shape, (33, 17), output_stride)
        if self.pad and not _rounds_up(shape, (2 * output_stride, output_stride), output_stride):
            raise UserError(f"model.backbone: timm/{name} takes images of its own size alone")

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the maps at stride 4 and at the output stride, of sizes rounded up."""
        height, width = images.shape[-2:]
        if self.pad:  # this network would round sizes down, and small ones to nothing
            images = pad_to_multiple(images, self.output_stride)
        low_level, last = self.net(images)
        if getattr(self.net, "output_fmt", "NCHW") == "NHWC":
            low_level, last = low_level.permute(0, 3, 1, 2), last.permute(0, 3, 1, 2)
        if not self.pad:
            return low_level, last
        return tuple(  # divided so that it also rounds up in ONNX, whose division truncates
            cut(maps, (height + stride - 1) // stride, (width + stride - 1) // stride)
            for maps, stride in ((low_level, 4), (last, self.output_stride))
        )

    def rename(self, weights: Weights) -> Weights:
        """Give weights of timm's whole classifier this encoder's keys, leaving others out."""
        flat = {key.replace(".", "_"): value for key, value in weights.items()}
        names = {key: key.removeprefix("net.").replace(".", "_") for key in self.state_dict()}
        return {key: flat[name] for key, name in names.items() if name in flat}


class TimmTransformer(nn.Module):
    """A plain vision transformer of timm's, DINOv2 and DINOv3 among them, for ``DPT``.

    Images are padded to multiples of the patch; position embeddings are interpolated.

    Args:
        name: timm's, with or without a tag: ``vit_small_patch14_dinov2.lvd142m``.

    Attributes:
        channels: channels of all four maps.
        patch_size: pixels, square.

    Raises:
        UserError: not a plain vision transformer.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        if patch_size_of(f"timm/{name}") is None:
            raise UserError(
                f"model.backbone: timm/{name} is not a plain vision transformer, which "
                "model.name=dpt needs; take timm/vit_small_patch14_dinov2.lvd142m or the like"
            )
        self.vit = _transformer(name)
        depth = len(self.vit.blocks)
        self.layers = [depth * quarter // 4 - 1 for quarter in (1, 2, 3, 4)]
        self.vit.prune_intermediate_layers(self.layers, prune_norm=False, prune_head=True)
        self.channels = self.vit.embed_dim
        self.patch_size = self.vit.patch_embed.patch_size[0]

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the normalised patch tokens after each quarter of the blocks, as maps."""
        images = pad_to_multiple(images, self.patch_size)
        return self.vit.forward_intermediates(
            images, indices=self.layers, norm=True, intermediates_only=True
        )

    def rename(self, weights: Weights) -> Weights:
        """Give weights of timm's classifier, or of the authors' file, this encoder's keys."""
        module = timm.models.eva if isinstance(self.vit, Eva) else timm.models.vision_transformer
        weights = module.checkpoint_filter_fn(weights, self.vit)
        return {key: weights[key[4:]] for key in self.state_dict() if key[4:] in weights}


def preprocessing_of(backbone: str) -> Preprocessing:
    """Return how ``model.backbone`` wants its images.

    Raises:
        UserError: timm knows no such network.
    """
    if not backbone.startswith("timm/"):
        return IMAGENET
    name = backbone.removeprefix("timm/")
    _refuse_unknown(name)
    if name.partition(".")[0] in LITE_NAMES:  # timm has 0.5 for both, a rounding of these
        return _LITE_PREPROCESSING
    source = timm.models.get_pretrained_cfg(name).to_dict()
    found = timm.data.resolve_data_config(pretrained_cfg=source)
    interpolation = "bilinear" if found["interpolation"] == "bilinear" else "bicubic"
    return Preprocessing(tuple(found["mean"]), tuple(found["std"]), interpolation)


@cache
def patch_size_of(backbone: str) -> int | None:
    """Return the patch of a plain vision transformer in pixels; None for other backbones.

    Raises:
        UserError: timm knows no such network.
    """
    if not backbone.startswith("timm/"):
        return None
    name = backbone.removeprefix("timm/")
    _refuse_unknown(name)
    try:
        with torch.device("meta"):
            net = _transformer(name)
    except TypeError:  # no such thing as ``dynamic_img_size``
        return None
    return net.patch_embed.patch_size[0] if isinstance(net, VisionTransformer | Eva) else None


def undilated_stride(backbone: str) -> int:
    """Return the stride at which ``timm/<name>`` ends if nothing is dilated: 32, or a patch."""
    if (patch := patch_size_of(backbone)) is not None:
        return patch
    with torch.device("meta"):
        return _pyramid(backbone.removeprefix("timm/"), 32).feature_info.reduction()[-1]


def refuse_crop(backbone: str, crop_size: int) -> None:
    """Refuse a crop that a vision transformer would have to pad.

    Raises:
        UserError: ``augment.crop_size`` is not a multiple of the patch.
    """
    patch = patch_size_of(backbone) or 1
    if crop_size % patch:
        lower = crop_size // patch * patch
        choice = f"{lower} or {lower + patch}" if lower else f"{patch}"
        raise UserError(
            f"augment.crop_size: {crop_size} is not a multiple of the {patch} pixels of a patch of "
            f"{backbone}; set {choice}"
        )


def pad_to_multiple(images: Tensor, multiple: int) -> Tensor:
    """Pad (B, C, H, W) at the bottom and right with zeros: after normalisation the mean colour."""
    height, width = images.shape[-2:]
    return F.pad(images, (0, -width % multiple, 0, -height % multiple))


def _pyramid(name: str, output_stride: int, **kwargs: list[int]) -> nn.Module:
    _refuse_unknown(name)
    try:
        if output_stride == 32:  # every network's own; many do not know the argument
            return timm.create_model(name, features_only=True, **kwargs)
        return timm.create_model(name, features_only=True, output_stride=output_stride, **kwargs)
    except _REFUSALS:
        try:
            return timm.create_model(name, features_only=True, **kwargs)
        except _REFUSALS as error:
            raise UserError(
                f"model.backbone: timm/{name} gives no maps of features ({error}); take another"
            ) from error


def _transformer(name: str) -> nn.Module:
    return timm.create_model(name, num_classes=0, dynamic_img_size=True)


def _refuse_unknown(name: str) -> None:
    try:
        if timm.is_model(name):
            timm.models.get_pretrained_cfg(name, allow_unregistered=False)
            return
    except RuntimeError:  # a tag that the network does not have
        pass
    known = [*timm.list_models(), *timm.list_models(f"{name.partition('.')[0]}*", pretrained=True)]
    near = ", ".join(get_close_matches(name, known, 3)) or "timm.list_models() has the names"
    raise UserError(f"model.backbone: timm {timm.__version__} has no '{name}'; near it: {near}")


def _rounds_up(net: nn.Module, size: tuple[int, int], output_stride: int) -> bool:
    """Say whether a network on the meta device takes a size, and divides it rounding up."""
    try:
        maps = net(torch.empty(1, 3, *size, device="meta"))
    except _REFUSALS:
        return False
    channels_last = getattr(net, "output_fmt", "NCHW") == "NHWC"
    last = maps[-1].shape[1:3] if channels_last else maps[-1].shape[2:]
    return tuple(last) == tuple(-(-length // output_stride) for length in size)
