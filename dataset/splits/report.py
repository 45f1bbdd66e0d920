"""An audit in words."""

from collections.abc import Iterator

from dataset.splits.audit import Audit


def audit_table(found: Audit) -> str:
    """Lay out an audit: lists, classes of the labeled list, query index, problems."""
    return "\n".join(_lines(found))


def _lines(found: Audit) -> Iterator[str]:
    yield "list         images"
    for name, count in found.images.items():
        yield f"{name:<9}  {count:>8}"
    width = max(len(name) for name in ["labeled", *(each.name for each in found.classes)])
    yield f"\n{'labeled':<{width}}    pixels  images  with {found.min_area:g} of the pixels"
    for name, share, images, guides in found.classes:
        queried = "excluded" if guides is None else guides
        yield f"{name:<{width}}  {share:>8.3%}  {images:>6}  {queried:>8}"
    yield ""
    if found.unreachable:
        yield f"no query can reach {', '.join(found.unreachable)}: lower query.min_area?"
    if found.hardly_reachable:
        yield (
            f"hardly a query reaches {', '.join(found.hardly_reachable)}: in most images that show "
            "them they are smaller"
        )
    if found.index is not None:
        places = ", ".join(f"{count} {place}" for place, count in found.index.items())
        yield f"query index: {sum(found.index.values())} images: {places}"
    for where, what, count, example in found.problems:
        yield f"{where}: {count} {what}: {example}"
    if not found.problems:
        yield "nothing found that training would refuse"
