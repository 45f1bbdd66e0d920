"""Fetch what training reads and git does not keep: ``python -m dataset.prepare COMMAND``.

``weights resnet101 …`` writes torchvision's ImageNet weights as ``pretrained/resnet101.pth``.
``pascal``, ``cityscapes``, ``coco`` and ``camvid`` put a public data set into the layout that
configs read, with its lists.
"""

import os
from collections.abc import Callable
from pathlib import Path

from dataset.prepare.camvid import prepare_camvid
from dataset.prepare.cityscapes import prepare_cityscapes
from dataset.prepare.coco import prepare_coco
from dataset.prepare.pascal import prepare_pascal
from dataset.prepare.weights import PRETRAINED, WEIGHTS, fetch_weights
from utils.errors import Parser, exit_with_one_line

DATA_SETS = {  # functions of (root, download, workers, counts of images in each list)
    "pascal": (prepare_pascal, "VOC 2012 with the masks of SBD"),
    "cityscapes": (prepare_cityscapes, "train ids from label ids"),
    "coco": (prepare_coco, "COCO 2017, semantic masks from instances"),
    "camvid": (prepare_camvid, "SegNet's CamVid, void to 255"),
}


def main() -> None:
    """Fetch what training reads and git does not keep."""
    parser = Parser(prog="python -m dataset.prepare", description=main.__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    about = "ImageNet weights of backbones"
    weights = commands.add_parser("weights", help=about, description=about)
    weights.add_argument("names", nargs="+", metavar="NAME", help=", ".join(WEIGHTS))
    weights.add_argument(
        "--to", type=Path, default=PRETRAINED, metavar="DIR", help="instead of pretrained/"
    )
    weights.add_argument("--mirror", metavar="URL", help="base address that has the same files")
    weights.set_defaults(run=lambda typed: fetch_weights(typed.names, typed.to, typed.mirror))
    for name, (prepare, about) in DATA_SETS.items():
        _add_data_set(commands.add_parser(name, help=about, description=about), prepare)
    arguments = parser.parse_args()
    arguments.run(arguments)


def _add_data_set(parser: Parser, prepare: Callable[..., None]) -> None:
    parser.add_argument(
        "--root", type=Path, required=True, metavar="DIR", help="where archives are and files go"
    )
    parser.add_argument("--download", action="store_true", help="fetch archives that are missing")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count(), metavar="N", help="threads; default: cores"
    )
    parser.set_defaults(run=lambda typed: prepare(typed.root, typed.download, typed.workers))


if __name__ == "__main__":
    exit_with_one_line(main)
