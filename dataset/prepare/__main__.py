"""Fetch what training reads and git does not keep: ``python -m dataset.prepare COMMAND``.

``weights resnet101 …`` writes torchvision's ImageNet weights as ``pretrained/resnet101.pth``.
"""

import argparse
from pathlib import Path

from dataset.prepare.weights import PRETRAINED, WEIGHTS, fetch_weights
from utils.errors import exit_with_one_line


def main() -> None:
    """Fetch what training reads and git does not keep."""
    parser = argparse.ArgumentParser(prog="python -m dataset.prepare", description=main.__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    about = "ImageNet weights of backbones"
    weights = commands.add_parser("weights", help=about, description=about)
    weights.add_argument("names", nargs="+", metavar="NAME", help=", ".join(WEIGHTS))
    weights.add_argument(
        "--to", type=Path, default=PRETRAINED, metavar="DIR", help="instead of pretrained/"
    )
    weights.add_argument("--mirror", metavar="URL", help="base address that has the same files")
    weights.set_defaults(run=lambda typed: fetch_weights(typed.names, typed.to, typed.mirror))
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    exit_with_one_line(main)
