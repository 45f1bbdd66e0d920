"""Draws the demo set: ``python -m dataset.demo ROOT``."""

from pathlib import Path

from dataset.catalog import KINDS
from dataset.demo.writing import Scenes, write_demo
from utils.errors import Parser, UserError, exit_with_one_line


def main() -> None:
    """``python -m dataset.demo ROOT``: draw the demo set."""
    parser = Parser(prog="python -m dataset.demo", description=main.__doc__)
    parser.add_argument("root", type=Path, help="folder to write, such as data/demo")
    parser.add_argument("--seed", type=int, default=0, help="draws other scenes")
    arguments = parser.parse_args()
    if arguments.seed < 0:
        raise UserError(f"--seed: {arguments.seed} is below 0; take a larger one")
    write_demo(arguments.root, KINDS["demo"].palette(), Scenes(seed=arguments.seed))


if __name__ == "__main__":
    exit_with_one_line(main)
