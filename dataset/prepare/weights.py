"""ImageNet weights of backbones, torchvision's files, checked by their hashes."""

from collections.abc import Sequence
from pathlib import Path

from torchvision.models import get_model_weights

from dataset.prepare.archives import download
from utils.errors import UserError

PRETRAINED = Path(__file__).resolve().parents[2] / "pretrained"
WEIGHTS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
BY_HAND = ("xception65", "resnet50_deep", "resnet101_deep")


def fetch_weights(names: Sequence[str], folder: Path, mirror: str | None = None) -> None:
    """Fetch torchvision's weights as ``<name>.pth``, checked against the hash in their file names.

    ``names`` are some of ``WEIGHTS``; ``mirror`` is a base address of files of these names.

    Raises:
        UserError: as ``download``; a name without a public address, before anything is fetched.
    """
    for name in names:
        if name in BY_HAND:
            raise UserError(
                f"{name}: there is no public address with a checksum; pretrained/README.md tells "
                f"where to fetch it by hand; save it as {folder / name}.pth"
            )
        if name not in WEIGHTS:
            raise UserError(f"{name}: no such weights; known are {', '.join((*WEIGHTS, *BY_HAND))}")
    for name in names:
        url, path = get_model_weights(name).IMAGENET1K_V1.url, folder / f"{name}.pth"
        base, file = url.rsplit("/", 1)
        digest = file.removesuffix(".pth").rsplit("-", 1)[-1]  # the first digits of the sha256
        download(f"{(mirror or base).rstrip('/')}/{file}", path, digest)
        print(f"{path}: ready, its sha256 begins with {digest}")
