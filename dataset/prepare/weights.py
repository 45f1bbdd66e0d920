"""ImageNet weights of backbones, torchvision's files, checked by their hashes."""

from collections.abc import Sequence
from pathlib import Path

from torchvision.models import get_model_weights

from dataset.prepare.download import download
from utils.errors import UserError

PRETRAINED = Path(__file__).resolve().parents[2] / "pretrained"
WEIGHTS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
BY_HAND = {  # the name in UniMatch's README, the file that its link gives
    "xception65": ("Xception-65", "xception.pth"),
    "resnet50_deep": ("ResNet-50", "resnet50.pth"),
    "resnet101_deep": ("ResNet-101", "resnet101.pth"),
}


def fetch_weights(names: Sequence[str], folder: Path, mirror: str | None = None) -> None:
    """Fetch torchvision's weights as ``<name>.pth``, checked against the hash in their file names.

    Args:
        names: some of ``WEIGHTS``.
        folder: where the files go.
        mirror: base address that has files of the same names; None for torchvision's own.

    Raises:
        UserError: as ``download``; a name without a public address, before anything is fetched.
    """
    for name in names:
        _refuse_unfetchable(name, folder)
    for name in names:
        url, sha256_prefix = _address(name)
        if mirror is not None:
            url = f"{mirror.rstrip('/')}/{url.rsplit('/', 1)[-1]}"
        path = folder / f"{name}.pth"
        download(url, path, sha256_prefix)
        print(f"{path}: ready, its sha256 begins with {sha256_prefix}")


def _refuse_unfetchable(name: str, folder: Path) -> None:
    if name in BY_HAND:
        entry, file = BY_HAND[name]
        raise UserError(
            f"{name}: there is no public address with a checksum; fetch {file} by hand from the "
            f"link '{entry}' in UniMatch's README (https://github.com/LiheYoung/UniMatch) and "
            f"save it as {folder / name}.pth"
        )
    if name not in WEIGHTS:
        raise UserError(f"{name}: no such weights; known are {', '.join((*WEIGHTS, *BY_HAND))}")


def _address(name: str) -> tuple[str, str]:
    """Return torchvision's URL, and the first digits of the sha256 that end its name."""
    url = get_model_weights(name).IMAGENET1K_V1.url
    return url, url.removesuffix(".pth").rsplit("-", 1)[-1]
