"""Checkpoints: weights with the config, stage and epoch they come from. No pickled code is run."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from utils.errors import UserError
from utils.files import write_atomically


def save(path: Path, content: dict[str, Any]) -> None:
    """Write tensors, numbers, strings and containers of them, atomically."""
    write_atomically(path, lambda partial: torch.save(content, partial))


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU, with ``weights_only=True`` always.

    Raises:
        UserError: no such file; or one that is truncated, no checkpoint, or holds pickled code.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint; name a checkpoint.pth of a run")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load documents no list of what a broken file raises
        raise UserError(
            f"{path}: not a whole checkpoint of tensors ({type(error).__name__}); "
            "copy or download it again"
        ) from error
    if not isinstance(content, dict):
        raise UserError(
            f"{path}: holds a {type(content).__name__}, not a dict of weights; take another file"
        )
    return content


def load_weights(net: nn.Module, path: Path) -> None:
    """Load a checkpoint's weights into a network or backbone.

    Args:
        net: gets the weights; every one of its keys must be in the file.
        path: a file of this project, a bare state dict, or ``{"model": ...}``; ``module.``
            prefixes are dropped, and an image classifier's ``fc.*`` where ``net`` has none.

    Raises:
        UserError: as ``load``; or the keys or shapes do not fit, with the first that differs.
    """
    content = load(path)
    weights = content.get("model", content)
    if not isinstance(weights, dict):
        raise UserError(f"{path}: its 'model' holds no weights; take a checkpoint of a network")
    weights = {
        key.removeprefix("module."): value
        for key, value in weights.items()
        if isinstance(value, Tensor)
    }
    own = net.state_dict()
    if "fc.weight" not in own:
        weights = {key: value for key, value in weights.items() if not key.startswith("fc.")}
    missing, unexpected = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    reshaped = [k for k in own.keys() & weights.keys() if own[k].shape != weights[k].shape]
    if not (missing or unexpected or reshaped):
        net.load_state_dict(weights)
        return
    examples = [f"missing {key}" for key in missing[:1]]
    examples += [f"unexpected {key}" for key in unexpected[:1]]
    examples += [
        f"{key} is {tuple(weights[key].shape)}, not {tuple(own[key].shape)}"
        for key in sorted(reshaped)[:1]
    ]
    raise UserError(
        f"{path}: weights of another network: {len(missing)} keys missing, {len(unexpected)} "
        f"unexpected, {len(reshaped)} of another shape ({', '.join(examples)}); "
        "check model.name, model.backbone and the number of classes"
    )
