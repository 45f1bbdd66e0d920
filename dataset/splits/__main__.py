"""Lists of images: ``python -m dataset.splits make | check | suggest | extend``.

make      draw a labeled list from a training list, for example 1/8 of it
check     look for what would invalidate a result: counts, overlaps, files, classes
suggest   choose the unlabeled images of a run that are worth a label
extend    add new labels to the lists of a run
"""

import argparse
import re
from fractions import Fraction
from pathlib import Path

from dataset.catalog import dataset_info
from dataset.lists import find_root
from dataset.query import QueryRule
from dataset.splits.check import audit, table_of
from dataset.splits.extend import extend_lists
from dataset.splits.make import make_lists
from dataset.splits.suggest import write_suggestions
from utils.config.reading import read_config
from utils.errors import Parser, UserError, exit_with_one_line
from utils.files import write_json
from utils.outputs import Output, refuse_outputs


def main() -> None:
    """Make and check lists of images."""
    parser = Parser(prog="python -m dataset.splits", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    more = "key=value words change the config, such as dataset.root=DIR"
    add = (one := commands.add_parser("make", epilog=more)).add_argument
    one.set_defaults(run=make)
    add("--train", type=Path, required=True, metavar="LIST", help="image mask lines")
    size = one.add_mutually_exclusive_group(required=True)
    size.add_argument("--fraction", metavar="SHARE", help="such as 1/8 or 0.125, rounded up")
    size.add_argument("--count", type=int, help="number of labeled images, instead")
    add("--seed", type=int, default=0, help="lists of one seed are nested (0)")
    add("--out", type=Path, required=True, metavar="DIR", help="folder for both lists")
    add("--config", help="data, for --stratify and bare ids")
    add("--stratify", action="store_true", help="keep every class; reads the masks")
    add = (one := commands.add_parser("check", epilog=more)).add_argument
    one.set_defaults(run=check)
    add("--config", required=True, help="names lists, root and query rule")
    add("--json", type=Path, metavar="FILE", help="write what was found here")
    add = (one := commands.add_parser("suggest")).add_argument
    one.set_defaults(run=suggest)
    add("folder", type=Path, metavar="RUN", help="outdir/<name>, of which stage 2 has ended")
    add("--count", type=int, default=20, help="number of images to label (20)")
    add("--out", type=Path, metavar="DIR", help="folder for the files (RUN/suggested)")
    add = (one := commands.add_parser("extend")).add_argument
    one.set_defaults(run=extend)
    add("folder", type=Path, metavar="RUN", help="outdir/<name>, whose lists are extended")
    add("--labels", type=Path, required=True, metavar="LIST", help="image mask lines to add")
    add("--out", type=Path, required=True, metavar="DIR", help="folder for both lists")
    typed, settings = parser.parse_known_args()
    if unknown := [word for word in settings if word.startswith("-")]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    typed.run(typed, settings)


def make(typed: argparse.Namespace, settings: list[str]) -> None:
    """Draw a labeled list from a training list; the rest is unlabeled."""
    share = typed.count if typed.fraction is None else _fraction(typed.fraction)
    root, kind, rule = Path(), None, None
    if typed.config is not None:
        config = read_config(typed.config, settings)
        kind = dataset_info(config.dataset)
        if typed.stratify:
            root, rule = find_root(config.dataset), QueryRule.of(config.query, kind)
    elif typed.stratify or settings:
        raise UserError("--config: missing; --stratify and settings need the config of the data")
    report = make_lists(typed.train, share, typed.seed, typed.out, root, kind, rule)
    print(*report, sep="\n")


def check(typed: argparse.Namespace, settings: list[str]) -> None:
    """Look for what would invalidate a result; a ``UserError`` if training would refuse it."""
    config = read_config(typed.config, settings)
    if typed.json is not None:
        read = {"--config": Path(typed.config), "dataset.root": Path(config.dataset.root)}
        refuse_outputs([Output("--json", typed.json, [".json"])], read)
    found = audit(config)
    print(*table_of(found), sep="\n")
    if typed.json is not None:
        write_json(typed.json, found)
    if problems := found["problems"]:
        more = f" ({len(problems)} sorts of problems are listed above)"
        raise UserError(problems[0]["example"] + (more if len(problems) > 1 else ""))


def suggest(typed: argparse.Namespace, settings: list[str]) -> None:
    """Write which images to label next, and print why."""
    _refuse_settings("suggest", settings)
    out = typed.folder / "suggested" if typed.out is None else typed.out
    refuse_outputs([Output("--out", out)], {})
    print(*write_suggestions(typed.folder, typed.count, out), sep="\n")


def extend(typed: argparse.Namespace, settings: list[str]) -> None:
    """Write the lists of a run with new labels, and print how it goes on."""
    _refuse_settings("extend", settings)
    print(*extend_lists(typed.folder, typed.labels, typed.out), sep="\n")


def _refuse_settings(command: str, settings: list[str]) -> None:
    if settings:
        raise UserError(f"{settings[0]}: {command} takes no settings; they are the run's")


def _fraction(text: str) -> Fraction:
    # Without exponents: Fraction writes 1e-999999999 out.
    number = re.fullmatch(r"\d{1,9}/0*[1-9]\d{0,8}|\d?\.\d{1,20}|\d{1,9}", text, re.ASCII)
    if number is None:
        raise UserError(f"--fraction: '{text[:40]}' is no share; write 1/8 or 0.125")
    return Fraction(text)


if __name__ == "__main__":
    exit_with_one_line(main)
