"""Read a config: YAML files by ``base:``, then ``key=value`` from the command line."""

import difflib
import os.path
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from reprlib import Repr
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from utils.config.schema import Config
from utils.errors import UserError

_COMMAND_LINE = "command line"
_BASES = 20
CONFIGS = Path(__file__).resolve().parents[2] / "configs"
METHODS = sorted(file.stem for file in (CONFIGS / "methods").glob("*.yaml"))
# Keys and values of earlier versions, and what became of them.
_RENAMED_METHODS = {"cisc_published": "cisc"}
_RENAMED_KEYS = {
    "relabel": "is gone: stage 5 labels by the network of stage 4",
    "retrain.learn_queried": "is called 'retrain.learn_partners' now",
    "retrain.threshold_by_class": "is gone: thresholds by class gained nothing",
}
_RENAMED_VALUES = {
    ("retrain.weight", "image"): "is called 'cisc_map' now",
    **{
        ("retrain.weight", name): "is gone, as it gained nothing; take ones or cisc_map"
        for name in ("bank", "confidence", "anchors", "confidence_anchors")
    },
    ("retrain.mix", "queried"): "is gone, as it gained nothing; take none, cutout or unlabeled",
}
Layer = tuple[str, Mapping[str, Any]]  # where settings come from, and the settings


_SHORT = Repr()  # of values: one from a checkpoint may hold itself, or a billion parts
_SHORT.maxstring = _SHORT.maxother = 200
_SHORT.maxlevel, _SHORT.maxlist, _SHORT.maxdict = 3, 20, 20


class _Loader(yaml.SafeLoader):
    """YAML with keys as strings, none of them twice: YAML itself keeps the last one silently.

    Without aliases: a few lines of them make gigabytes.
    """

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            message = "aliases (*name, <<) are not read; write the value out, or use base:"
            raise yaml.composer.ComposerError(None, None, message, mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[str, Any]:
        keys = [str(self.construct_object(key, deep=True)) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                message = f"the key {key!r} is there twice"
                raise yaml.constructor.ConstructorError(None, None, message, node.start_mark)
        values = [self.construct_object(value, deep=deep) for _, value in node.value]
        return dict(zip(keys, values, strict=True))

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int | str:
        """Leave 1_16, the name of a split, a string: YAML 1.1 reads it as 116."""
        named = re.fullmatch(r"\d+_\d+", node.value)
        return node.value if named else super().construct_yaml_int(node)


# YAML 1.2's booleans: a class may be called no or on. A flag still takes them.
_BOOL = "tag:yaml.org,2002:bool"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in forms if tag != _BOOL]
    for first, forms in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_BOOL, re.compile(r"(?:true|True|TRUE|false|False|FALSE)$"), "tTfF")
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def read_config(path: str, overrides: Sequence[str] = (), method: str | None = None) -> Config:
    """Read and check a config.

    Args:
        path: a YAML file, looked for in the working folder, then in ``configs/``.
        overrides: ``section.key=value`` with the value in YAML; the last one counts.
        method: one of ``METHODS``, in place of the file's ``method:``.

    The method's overlay comes first, so that keys of the file and of the command line count.

    Raises:
        UserError: no such file, no YAML, an unknown key (the nearest is named), a wrong value.
    """
    own = [] if method is None else [(_COMMAND_LINE, {"method": method})]
    layers = [*_file_layers(path), *own]
    overlay = f"methods/{_chosen_method([*layers, *map(_override, overrides)])}.yaml"
    return _validate([*_file_layers(overlay), *layers], overrides)


def _chosen_method(layers: Sequence[Layer]) -> str:
    """Return the method that the last layer names, or the schema's default."""
    named = [values["method"] for _, values in layers if "method" in values]
    chosen = named[-1] if named else Config.model_fields["method"].default
    if chosen in METHODS:
        return chosen
    now = _RENAMED_METHODS.get(str(chosen))
    if now is not None:
        raise UserError(f"method: '{chosen}' is called '{now}' now")
    raise UserError(f"method: {_SHORT.repr(chosen)} is not one of {', '.join(METHODS)}")


def config_from(values: Mapping[str, Any], source: str, overrides: Sequence[str] = ()) -> Config:
    """Check settings that a checkpoint carries, with overrides as in ``read_config``.

    Raises:
        UserError: an unknown key or a wrong value, with the source.
    """
    return _validate([(source, values)], overrides)


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return settings by dotted key, such as ``dataset.root``; empty sections have none."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        inner = isinstance(value, dict)
        found.update(flatten(value, f"{prefix}{key}.") if inner else {prefix + key: value})
    return found


def _validate(layers: list[Layer], overrides: Sequence[str]) -> Config:
    """Merge layers, later over earlier, key by key, and check the result."""
    layers = [*layers, *map(_override, overrides)]
    merged: dict[str, Any] = {}
    for _, values in layers:
        merged = _merge(merged, values)
    try:
        return Config.model_validate(merged)
    except ValidationError as error:
        raise UserError(_explain(error, layers)) from None


def _merge(lower: Mapping[str, Any], upper: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(lower)
    for key, value in upper.items():
        both = isinstance(value, dict) and isinstance(lower.get(key), dict)
        merged[key] = _merge(lower[key], value) if both else value
    return merged


def _file_layers(name: str) -> list[Layer]:
    """Return the settings of a file and of its bases, deepest base first."""
    layers: list[Layer] = []
    path, seen = _find(name, Path()), []
    while path is not None:
        if path.resolve() in seen:
            raise UserError(f"{path}: 'base' leads back to this file")
        if len(seen) > _BASES:
            raise UserError(f"{path}: more than {_BASES} files in a chain of 'base:'; merge some")
        seen.append(path.resolve())
        try:
            content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
        except (OSError, yaml.YAMLError, ValueError) as error:  # or not UTF-8, no such date
            raise UserError(f"{path}: not YAML: {error}") from error
        except RecursionError:
            raise UserError(f"{path}: is nested too deeply for a config") from None
        if not isinstance(content, dict):
            raise UserError(f"{path}: holds no 'key: value' lines")
        base = content.pop("base", None)
        if not isinstance(base, str | None):
            raise UserError(f"{path}: base: {base!r} is not allowed: it names another config")
        layers.insert(0, (str(path), content))
        path = None if base is None else _find(base, path.parent)
    return layers


def _find(name: str, beside: Path) -> Path:
    for candidate in (beside / name, Path(name), CONFIGS / name):
        if os.path.isfile(candidate):  # noqa: PTH113 - False also for a name no file could have
            return candidate
    known = ", ".join(sorted(file.name for file in CONFIGS.glob("*.yaml")))
    raise UserError(f"{name}: no such config here or in configs/, which has {known}")


def _override(text: str) -> Layer:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UserError(f"'{text}': settings on the command line read key=value")
    try:
        parsed: Any = yaml.load(value, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = f": {error.problem}" if isinstance(error, yaml.composer.ComposerError) else ""
        raise UserError(f"'{text}': the value is not YAML{reason}") from error
    for part in reversed(key.split(".")):
        parsed = {part: parsed}
    return _COMMAND_LINE, parsed


_ALLOWED = {  # by the validator's kind of error
    "model_type": "a section holds 'key: value' lines",
    "missing": "there are too few values",
    "string_type": "text, in quotes where YAML reads something else",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "int_type": "an integer",
    "int_parsing": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "float_parsing": "a number",
    "list_type": "a list, such as [a, b]",
    "tuple_type": "a list, such as [a, b]",
    "dict_type": "pairs, such as {a: b}",
    "too_short": "there are too few values",
}


def _explain(error: ValidationError, layers: Sequence[Layer]) -> str:
    """Say in one line what is wrong: file, key, value, what is allowed."""
    errors = error.errors()
    # A misspelled section is unknown and missing at once; the spelling is the cause.
    first = next((each for each in errors if each["type"] == "extra_forbidden"), errors[0])
    kind, location = first["type"], first["loc"]
    # Without places in a list, and pydantic's mark of a wrong key of class_map.
    path = [part for part in location if isinstance(part, str) and part != "[key]"]
    key = ".".join(path)
    source = next((name for name, values in reversed(layers) if _sets(values, path)), layers[0][0])
    if key in _RENAMED_KEYS and kind == "extra_forbidden":
        return f"{source}: '{key}' {_RENAMED_KEYS[key]}"
    if isinstance(first["input"], str) and (key, first["input"]) in _RENAMED_VALUES:
        return f"{source}: {key}: '{first['input']}' {_RENAMED_VALUES[key, first['input']]}"
    if kind == "extra_forbidden":
        return f"{source}: unknown key '{key}'; the nearest known key is '{_nearest(key)}'"
    if kind == "missing" and location[-1] in path:
        file = next(name for name, _ in reversed(layers) if name != _COMMAND_LINE)
        return f"{file}: key '{key}' is missing; add it"
    said = first["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    allowed = _ALLOWED.get(kind, said)
    return f"{source}: {key}: {_SHORT.repr(first['input'])} is not allowed: {allowed}"


def _sets(values: Any, path: Sequence[str]) -> bool:
    """Whether a layer sets a key, or a section around it to something else."""
    for part in path:
        if not isinstance(values, dict):
            return True
        if part not in values:
            return False
        values = values[part]
    return True


def _nearest(key: str) -> str:
    """Return the known key whose last part is most like the given one's, then the whole key.

    One of the same section counts if its last part is almost the given one's.
    """
    section, _, name = key.rpartition(".")

    def likeness(known: str) -> list[float]:
        place, _, last = known.rpartition(".")
        alike, whole = (
            difflib.SequenceMatcher(None, *pair).ratio() for pair in ((last, name), (known, key))
        )
        return [place == section and alike > 0.8, alike, whole]

    return max(_keys(Config), key=likeness)


def _keys(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yield every dotted key of a section."""
    for name, field in section.model_fields.items():
        yield prefix + name
        for kind in (field.annotation, *get_args(field.annotation)):
            if hasattr(kind, "model_fields"):
                yield from _keys(kind, f"{prefix}{name}.")
