"""Fetch what training reads and git does not keep: ``python -m dataset.prepare COMMAND``.

``weights resnet101 …`` writes torchvision's ImageNet weights as ``pretrained/resnet101.pth``.
``pascal``, ``cityscapes``, ``coco`` and ``camvid`` put a public data set into the layout that
configs read, with its lists.
``labels`` writes masks and lists from the labels of a tool; ``export-labels`` writes the pseudo
labels of a run for correction in a tool.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from torchvision.models import get_model_weights

from dataset.prepare.archives import download
from dataset.prepare.camvid import CAMVID
from dataset.prepare.cityscapes import CITYSCAPES
from dataset.prepare.coco import COCO_2017
from dataset.prepare.labels.commands import add_commands
from dataset.prepare.pascal import PASCAL
from dataset.prepare.work import prepare
from utils.errors import Parser, UserError, exit_with_one_line

DATA_SETS = {"pascal": PASCAL, "cityscapes": CITYSCAPES, "coco": COCO_2017, "camvid": CAMVID}
PRETRAINED = Path(__file__).resolve().parents[2] / "pretrained"
WEIGHTS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
BY_HAND = ("xception65", "resnet50_deep", "resnet101_deep")


def main() -> None:
    """Fetch what training reads and git does not keep."""
    parser = Parser(prog="python -m dataset.prepare", description=__doc__)
    commands = parser.add_subparsers(required=True, dest="command", metavar="COMMAND")
    weights = commands.add_parser("weights", help="ImageNet weights of backbones")
    weights.add_argument("names", nargs="+", metavar="NAME", help=", ".join(WEIGHTS))
    weights.add_argument(
        "--to", type=Path, default=PRETRAINED, metavar="DIR", help="instead of pretrained/"
    )
    weights.add_argument("--mirror", metavar="URL", help="base address that has the same files")
    for name, data in DATA_SETS.items():
        one = commands.add_parser(name, help=data.about, description=data.about)
        one.add_argument(
            "--root", type=Path, required=True, metavar="DIR", help="of the archives and the result"
        )
        one.add_argument("--download", action="store_true", help="fetch archives that are missing")
        one.add_argument(
            "--workers",
            type=int,
            default=os.cpu_count(),
            metavar="N",
            help="threads (one per core)",
        )
    add_commands(commands)
    typed = parser.parse_args()
    if "run" in typed:
        typed.run(typed)
    elif typed.command == "weights":
        fetch_weights(typed.names, typed.to, typed.mirror)
    else:
        prepare(DATA_SETS[typed.command], typed.root, typed.download, typed.workers)


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


if __name__ == "__main__":
    exit_with_one_line(main)
