"""Checkpoints: weights with the config, stage and epoch they come from. No pickled code is run.

A file of torch's; a ``.safetensors`` file with all but the weights in its metadata; or a folder of
``config.json`` and ``model.safetensors``, as on the Hugging Face hub.
"""

import json
import re
import zipfile
from argparse import Namespace
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from utils.errors import UserError
from utils.files import read_json, write_atomically, write_json

Weights = dict[str, Tensor]
# UniMatch keeps its best mIoU as a numpy number, under numpy 1's name for what builds it;
# torchvision's references keep their command line.
_HARMLESS = [
    Namespace,
    np.dtype,
    np.dtypes.Float64DType,
    np.dtypes.Float32DType,
    np._core.multiarray.scalar,
    (np._core.multiarray.scalar, "numpy.core.multiarray.scalar"),
]
SUFFIXES = ("", ".pth", ".safetensors")  # "": a folder
# Where other programs keep weights in a file, and what wrappers put before every key of a network.
_WEIGHTS = ("model", "state_dict", "model_state_dict", "model_state", "ema")
_PREFIXES = ("module.", "_orig_mod.", "model.", "net.")
_REFUSED = re.compile(r"GLOBAL ([\w.]+)")  # a class, in torch's message
_METADATA = "checkpoint"  # of a .safetensors file, in JSON; all values there are text
_FOLDER = ("config.json", "model.safetensors")
_BACKBONE = "backbone."  # begins the keys of a network's encoder
_SMP_HEAD = "segmentation_head."  # begins keys in networks of segmentation_models_pytorch
_SHOWN = 8  # keys of each kind in the table of a mismatch


def save(path: Path, content: dict[str, Any]) -> None:
    """Write tensors, numbers, strings and containers of them, atomically.

    Args:
        path: a ``.safetensors`` file, or a folder, a path without a suffix, take the weights in
            ``content["model"]`` and what JSON can express beside them; any other path is torch's.
        content: to be written.

    Raises:
        UserError: the disk is full, the place is not to be written to, or the folder holds other
            files.
    """
    if path.suffix not in ("", ".safetensors"):
        write_atomically(path, lambda place: write(place, content))
        return
    weights = {key: value.contiguous() for key, value in content["model"].items()}
    others = {key: value for key, value in content.items() if key != "model"}
    metadata = {"format": "pt", _METADATA: json.dumps(others)}
    if path.suffix == "":
        if path.is_dir() and any(path.iterdir()) and not _is_folder(path):
            raise UserError(f"{path}: holds other files; name a new folder")
        metadata.pop(_METADATA)
        write_json(path / _FOLDER[0], others)
        path /= _FOLDER[1]
    write_atomically(path, partial(_write_safetensors, weights, metadata))


def write(path: Path, content: dict[str, Any]) -> None:
    """Write as ``save``, but not atomically; what fails leaves no file.

    Raises:
        OSError: the disk is full, or the place is not to be written to.
    """
    try:
        torch.save(content, path)
    except RuntimeError as error:  # what torch makes of a write that fails
        path.unlink(missing_ok=True)
        raise OSError(f"torch writes no further, the disk may be full: {error}") from error


def _is_folder(path: Path) -> bool:
    return all((path / name).is_file() for name in _FOLDER)


def _write_safetensors(weights: Weights, metadata: dict[str, str], path: Path) -> None:
    try:
        safetensors.torch.save_file(weights, path, metadata)
    except safetensors.SafetensorError as error:
        path.unlink(missing_ok=True)
        raise OSError(f"safetensors writes no further, the disk may be full: {error}") from error


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint in any of its forms onto the CPU, with ``weights_only=True`` always.

    Raises:
        UserError: no such file; or one that is truncated, no checkpoint, or holds pickled code.
    """
    if _is_folder(path):
        others = read_json(path / _FOLDER[0])
        if not isinstance(others, dict):
            raise UserError(f"{path / _FOLDER[0]}: holds no JSON object; download it again")
        return {**others, "model": load(path / _FOLDER[1])}
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint; name a checkpoint.pth of a run")
    try:
        if path.suffix == ".safetensors":
            with safetensors.safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
            weights = safetensors.torch.load_file(path)
            if _METADATA not in metadata:
                return weights
            return {**json.loads(metadata[_METADATA]), "model": weights}
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as parts:  # torch.load compares no checksum
                spoilt = parts.testzip()
            if spoilt is not None:
                raise ValueError(f"{spoilt} has another checksum")
        with torch.serialization.safe_globals(_HARMLESS):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # neither reader documents what a broken file raises
        raise UserError(f"{path}: {_complaint(error, path)}") from error
    if not isinstance(content, dict):
        raise UserError(
            f"{path}: holds a {type(content).__name__}, not a dict of weights; take another file"
        )
    return content


def _complaint(error: Exception, path: Path) -> str:
    refused = _REFUSED.search(str(error))
    if isinstance(error, PermissionError):
        return f"cannot read this file ({error.strerror}); correct that, or copy it again"
    if refused is None:
        kind = type(error).__name__
        return f"not a whole checkpoint of tensors ({kind}); copy or download it again"
    return (
        f"holds {refused[1]}, code that is not run; if you trust who made it, keep the tensors: "
        f"python -c \"import torch; c = torch.load('{path}', 'cpu', weights_only=False); "
        "torch.save(c.get('model', c.get('state_dict', c)), 'weights.pth')\""
    )


def load_weights(net: nn.Module, path: Path, reset_classifier: bool = False) -> None:
    """Load a checkpoint's weights into a network or backbone.

    Args:
        net: gets the weights, all of them or none.
        path: a file of this project, a bare state dict (CISC-R, ST++), or ``{"model": ...}``
            (UniMatch), or as ``weights_in`` finds them.
        reset_classifier: leave ``net.classifier`` as it is and the file's out.

    Raises:
        UserError: as ``load`` and ``put_weights``.
    """
    put_weights(net, weights_in(load(path), path), path, reset_classifier)


def put_weights(
    net: nn.Module, weights: Weights, path: Path, reset_classifier: bool = False
) -> list[str]:
    """Load weights that have been read, and return the file's keys that a network part left out.

    Args:
        net: gets the weights, all of them or none. An encoder takes the ``backbone.*`` of a whole
            network, or the ``encoder.*`` of one of segmentation_models_pytorch; or an image
            classifier's weights without its ``fc.*``, or those that its ``rename`` makes of them.
            Counters of batch norm, which old files lack, may be missing.
        weights: by key.
        path: where they come from, for the error.
        reset_classifier: as in ``load_weights``.

    Raises:
        UserError: the keys or shapes do not fit: a table says which; or a weight is not finite,
            or of another kind of number.
    """
    own, left_out = net.state_dict(), []
    if not hasattr(net, "backbone"):
        weights, left_out = _backbone_of(weights, net)
    else:
        refuse_smp(weights, path)
    if reset_classifier:
        weights = {key: value for key, value in weights.items() if not _is_classifier(key)}
        weights |= {key: value for key, value in own.items() if _is_classifier(key)}
    for key in own.keys() - weights.keys():
        if key.endswith("num_batches_tracked"):
            weights[key] = own[key]
    _refuse_other_classes(weights, own, path)
    _refuse_other_keys(weights, own, path)
    for key, value in weights.items():
        if _kind(value) != _kind(own[key]):
            raise UserError(
                f"{path}: {key} is of {value.dtype}, and the network's of {own[key].dtype}; take "
                "another checkpoint"
            )
    if not is_finite(weights):
        raise UserError(f"{path}: holds weights that are not finite; take another checkpoint")
    net.load_state_dict(weights)
    return left_out


def is_smp(keys: Iterable[str]) -> bool:
    """Tell whether keys of weights are those of a network of segmentation_models_pytorch."""
    return any(key.startswith(_SMP_HEAD) for key in keys)


def refuse_smp(weights: Weights, path: Path) -> None:
    """Raise a ``UserError`` if weights are of a whole network of segmentation_models_pytorch."""
    if is_smp(weights):
        raise UserError(
            f"{path}: is a network of segmentation_models_pytorch, whose decoder has other layers; "
            f"start training from its encoder by model.pretrained={path}"
        )


def _kind(numbers: Tensor) -> tuple[bool, bool, bool]:
    """Tell floats, complex numbers and booleans from whole numbers: no cast leads there."""
    return numbers.is_floating_point(), numbers.is_complex(), numbers.dtype == torch.bool


def is_finite(weights: Weights) -> bool:
    """Tell whether all numbers are."""
    return all(bool(value.float().isfinite().all()) for value in weights.values())


def weights_in(content: dict[str, Any], path: Path) -> Weights:
    """Return the weights in what ``load`` has read, without the prefixes of wrappers.

    They are the content itself, or in it under ``model``, ``state_dict``, ``model_state_dict``,
    ``model_state`` or ``ema``. ``module.``, ``_orig_mod.``, ``model.`` and ``net.`` are dropped
    where every key has them.
    """
    weights = content
    while name := next((x for x in _WEIGHTS if x in weights), None):
        weights = weights[name]
        if not isinstance(weights, dict):
            raise UserError(
                f"{path}: its '{name}' holds no weights; take a checkpoint of a network"
            )
    weights = {
        key: value
        for key, value in weights.items()
        if isinstance(key, str) and isinstance(value, Tensor)
    }
    while weights and (prefix := next((x for x in _PREFIXES if _all_have(weights, x)), None)):
        weights = {key.removeprefix(prefix): value for key, value in weights.items()}
    if any(value.is_meta or value.layout != torch.strided for value in weights.values()):
        raise UserError(f"{path}: holds sparse tensors, or no numbers; take another checkpoint")
    return weights


def _all_have(weights: Weights, prefix: str) -> bool:
    return all(key.startswith(prefix) for key in weights)


def _backbone_of(weights: Weights, backbone: nn.Module) -> tuple[Weights, list[str]]:
    """Return a backbone's part of a whole network and the other keys; or a classifier's weights."""
    part = {key: value for key, value in weights.items() if key.startswith(_BACKBONE)}
    if part:
        others = [key for key in weights if key not in part]
        return {key.removeprefix(_BACKBONE): value for key, value in part.items()}, others
    left_out = []
    if is_smp(weights):
        left_out = [key for key in weights if not key.startswith("encoder.")]
        # timm's own networks, called "tu-...", are below "model".
        prefix = "encoder.model." if hasattr(backbone, "rename") else "encoder."
        weights = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
    if hasattr(backbone, "rename"):  # an encoder of timm's
        return backbone.rename(weights), left_out
    return {key: value for key, value in weights.items() if not key.startswith("fc.")}, left_out


def _is_classifier(key: str) -> bool:
    return key.startswith("classifier.")


def _refuse_other_classes(weights: Weights, own: Weights, path: Path) -> None:
    """Say so where the number of classes alone differs."""
    reshaped = [k for k in own.keys() & weights.keys() if own[k].shape != weights[k].shape]
    if weights.keys() != own.keys() or not reshaped or not all(map(_is_classifier, reshaped)):
        return
    there, here = len(weights[reshaped[0]]), len(own[reshaped[0]])
    raise UserError(
        f"{path}: was trained for {there} classes, and this network has {here}; name its config, "
        "or leave its classifier out with --reset-classifier"
    )


def _refuse_other_keys(weights: Weights, own: Weights, path: Path) -> None:
    missing = [f"missing     {key}" for key in own if key not in weights]
    unexpected = [f"unexpected  {key}" for key in weights if key not in own]
    reshaped = [
        f"shape       {key}  {tuple(weights[key].shape)}, not {tuple(own[key].shape)}"
        for key in own
        if key in weights and own[key].shape != weights[key].shape
    ]
    kinds = (missing, unexpected, reshaped)
    if not any(kinds):
        return
    rows = [row for kind in kinds for row in kind[:_SHOWN]]
    left_out = sum(map(len, kinds)) - len(rows)
    if left_out:
        rows.append(f"... and {left_out} more")
    raise UserError(
        f"{path}: weights of another network: {len(missing)} keys missing, {len(unexpected)} "
        f"unexpected, {len(reshaped)} of another shape; check model.name, model.backbone and "
        "model.stem",
        rows,
    )
