"""Fetch what training reads and git does not keep: ``python -m dataset.prepare COMMAND``.

``weights resnet101 …`` writes torchvision's ImageNet weights as ``pretrained/resnet101.pth``.
``pascal``, ``cityscapes``, ``coco`` and ``camvid`` put a public data set into the layout that
configs read, with its lists.
"""

import os
from pathlib import Path

from dataset.prepare.camvid import CAMVID
from dataset.prepare.cityscapes import CITYSCAPES
from dataset.prepare.coco import COCO_2017
from dataset.prepare.pascal import PASCAL
from dataset.prepare.weights import PRETRAINED, WEIGHTS, fetch_weights
from dataset.prepare.work import prepare
from utils.errors import Parser, exit_with_one_line

DATA_SETS = {"pascal": PASCAL, "cityscapes": CITYSCAPES, "coco": COCO_2017, "camvid": CAMVID}


def main() -> None:
    """Fetch what training reads and git does not keep."""
    parser = Parser(prog="python -m dataset.prepare", description=main.__doc__)
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
            "--root", type=Path, required=True, metavar="DIR", help="of archives and results"
        )
        one.add_argument("--download", action="store_true", help="fetch archives that are missing")
        one.add_argument(
            "--workers", type=int, default=os.cpu_count(), metavar="N", help="threads; all cores"
        )
    typed = parser.parse_args()
    if typed.command == "weights":
        fetch_weights(typed.names, typed.to, typed.mirror)
    else:
        prepare(DATA_SETS[typed.command], typed.root, typed.download, typed.workers)


if __name__ == "__main__":
    exit_with_one_line(main)
