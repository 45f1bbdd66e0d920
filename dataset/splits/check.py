"""What ``python -m dataset.splits check`` looks for and prints."""

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import numpy as np

from dataset.catalog import dataset_info
from dataset.lists import Splits, find_faults, find_root, lists_of, read_lists
from dataset.query import QueryRule
from utils import IGNORE
from utils.config.schema import Config
from utils.errors import UserError


def audit(config: Config) -> dict[str, Any]:
    """Read the lists of a config and decode their files, but no masks of unlabeled images.

    Returns:
        What ``--json`` writes: ``images``, how many by list; ``min_area`` of a query; ``classes``
        of labeled images without faults, with their ``share`` of the pixels that are not ignored,
        the number of ``images`` that show them and of ``partners`` that show enough of them (None:
        never queried); ``unreachable``, classes that are shown and have no partners;
        ``hardly_reachable``, classes for which fewer than half of their images are partners;
        ``ignored``, shares of the pixels of lists with masks; ``notes`` on what training accepts;
        ``problems`` that it refuses, lists that cannot be read among them.

    Raises:
        UserError: no root; a query rule that names an unknown class.
    """
    kind = dataset_info(config.dataset)
    rule = QueryRule.of(config.query, kind)
    find_root(config.dataset)
    splits, lines = Splits([], [], []), defaultdict(list)
    for field in lists_of(config.stages):
        try:
            read = read_lists(config.dataset, (field,))
            splits = splits._replace(**{field: getattr(read, field)})
        except UserError as error:
            lines[field, "lists that cannot be read"].append(str(error))
    areas, images, partners = np.zeros((3, rule.num_classes), dtype=np.int64)
    ignored = {where: [0, 0] for where in Splits._fields}  # pixels that are, and all
    notes = list[str]()

    def count(where: str, label: np.ndarray) -> None:
        ignored[where][0] += np.count_nonzero(label == IGNORE)
        ignored[where][1] += label.size
        if where == "labeled":
            area = rule.areas(label)
            areas[:] += area
            images[:] += area > 0
            partners[rule.classes_in(label)] += 1

    for fault in find_faults(splits, kind, decode=True, visit=count, note=notes.append):
        lines[fault.where, fault.what].append(fault.line)
    shares = (areas / max(1, areas.sum())).tolist()
    queried = [None if number in rule.excluded else int(n) for number, n in enumerate(partners)]
    rows = list(zip(kind.classes, shares, images.tolist(), queried, strict=True))
    columns, keys = ("name", "share", "images", "partners"), ("where", "what", "count", "example")
    counts = {x: len(samples) for x, samples in splits._asdict().items() if samples or x != "test"}
    masked = [name for name in counts if name != "unlabeled"]
    return {
        "images": counts,
        "min_area": rule.min_area,
        "classes": [dict(zip(columns, row, strict=True)) for row in rows],
        "unreachable": [name for name, _, shown, found in rows if shown and found == 0],
        "hardly_reachable": [name for name, _, shown, found in rows if found and 2 * found < shown],
        "ignored": {name: ignored[name][0] / max(1, ignored[name][1]) for name in masked},
        "notes": notes,
        "problems": [
            dict(zip(keys, (*sort, len(found), found[0]), strict=True))
            for sort, found in lines.items()
        ],
    }


def table_of(found: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of an audit: lists, classes of the labeled list, problems."""
    yield "list         images   ignored pixels"
    for name, count in found["images"].items():
        share = f"  {found['ignored'][name]:>15.3%}" if name in found["ignored"] else ""
        yield f"{name:<9}  {count:>8}{share}"
    width = max(len(name) for name in ["labeled", *(each["name"] for each in found["classes"])])
    yield f"\n{'labeled':<{width}}    pixels  images  with {found['min_area']:g} of the pixels"
    for name, share, images, partners in map(dict.values, found["classes"]):
        queried = "excluded" if partners is None else partners
        yield f"{name:<{width}}  {share:>8.3%}  {images:>6}  {queried:>8}"
    yield ""
    if found["unreachable"]:
        yield f"no query of cisc can reach {', '.join(found['unreachable'])}: lower query.min_area?"
    if found["hardly_reachable"]:
        names = ", ".join(found["hardly_reachable"])
        yield f"few queries of cisc can reach {names}: they are smaller in most of their images"
    yield from found["notes"]
    for where, what, count, example in map(dict.values, found["problems"]):
        yield f"{where}: {count} {what}: {example}"
    if not found["problems"]:
        yield "nothing found that training would refuse"
