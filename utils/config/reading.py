"""Read a config: YAML files by ``base:``, then ``key=value`` from the command line."""

import contextlib
import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from utils.config.schema import Config
from utils.errors import UserError

_COMMAND_LINE = "command line"
CONFIGS = Path(__file__).resolve().parents[2] / "configs"


class Layer(dict):
    """Settings from one place, and the place's name for error messages."""

    def __init__(self, values: Mapping[str, Any], source: str) -> None:
        super().__init__(values)
        self.source = source


class _Loader(yaml.SafeLoader):
    """Reads no key twice: YAML would take the last and forget the first without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            name = str(self.construct_object(key, deep=True))
            if name in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {name!r} stands there twice", key.start_mark
                )
            seen.add(name)
        return super().construct_mapping(node, deep)


def read_config(path: str, overrides: Sequence[str] = ()) -> Config:
    """Read and check a config.

    Args:
        path: a YAML file, looked for in the working folder, then in ``configs/``.
        overrides: ``section.key=value`` with the value in YAML; the last one counts.

    Raises:
        UserError: no such file, no YAML, an unknown key (the nearest is named), a wrong value.
    """
    return _checked(_file_layers(_find(path), seen=()), overrides)


def config_from(values: Mapping[str, Any], source: str, overrides: Sequence[str] = ()) -> Config:
    """Check settings that a checkpoint carries, with overrides as in ``read_config``.

    Raises:
        UserError: an unknown key or a wrong value, with the source.
    """
    return _checked([Layer(values, source)], overrides)


def _checked(layers: list[Layer], overrides: Sequence[str]) -> Config:
    """Merge layers, later over earlier, key by key, and check the result."""
    layers = [*layers, *(_override_layer(text) for text in overrides)]
    merged: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            try:
                _merge(merged, {key: value})
            except RecursionError:
                raise UserError(f"{layer.source}: {key}: the value holds itself") from None
    try:
        return Config.model_validate(merged)
    except ValidationError as error:
        raise UserError(_explain(error, layers)) from None


def _find(path: str, first: Path = Path()) -> Path:
    for candidate in (first / path, Path(path), CONFIGS / path):
        with contextlib.suppress(OSError, ValueError):  # no name that a file could have
            if candidate.is_file():
                return candidate
    known = ", ".join(sorted(file.name for file in CONFIGS.glob("*.yaml")))
    raise UserError(f"{path}: no such config here or in configs/, which has {known}")


def _file_layers(path: Path, seen: tuple[Path, ...]) -> list[Layer]:
    """Return the layers of a file and its bases, deepest base first."""
    if path.resolve() in seen:
        raise UserError(f"{path}: 'base' leads back to this file")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise UserError(f"{path}: cannot read this config ({error.strerror})") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: not UTF-8, no such date
        raise UserError(f"{path}: not YAML: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds no 'key: value' lines")
    base = content.pop("base", None)
    layers = []
    if base is not None:
        if not isinstance(base, str):
            raise UserError(f"{path}: base: {base!r} is not allowed: it names another config")
        found = _find(base, path.parent)
        layers = _file_layers(found, (*seen, path.resolve()))
    return [*layers, Layer(content, str(path))]


def _override_layer(text: str) -> Layer:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UserError(f"'{text}': settings on the command line read key=value")
    try:
        parsed: Any = yaml.load(value, _Loader)
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"'{text}': the value is not YAML") from error
    for part in reversed(key.split(".")):
        parsed = {part: parsed}
    return Layer(parsed, _COMMAND_LINE)


def _merge(into: dict[str, Any], layer: Mapping[str, Any]) -> None:
    for key, value in layer.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = _copy(value)


def _copy(value: Any) -> Any:
    return {key: _copy(part) for key, part in value.items()} if isinstance(value, dict) else value


def _explain(error: ValidationError, layers: Sequence[Layer]) -> str:
    """Say in one line what is wrong: file, key, value, what is allowed."""
    errors = error.errors()
    unknown = ("extra_forbidden", "invalid_key")
    # A misspelled section is unknown and missing at once; the spelling is the cause.
    first = next((each for each in errors if each["type"] in unknown), errors[0])
    # A place in a list, such as the 1 of augment.scale.1, is no key of its own.
    path = [part for part in first["loc"] if not isinstance(part, int) or first["type"] in unknown]
    path = [str(part) for part in path if part != "[key]"]  # pydantic's word for a wrong id
    key = ".".join(path)
    sources = [layer.source for layer in layers if _has(layer, path)] or [layers[-1].source]
    if first["type"] in unknown:
        return f"{sources[-1]}: unknown key '{key}'; the nearest known key is '{_nearest(key)}'"
    if first["type"] == "missing" and not isinstance(first["loc"][-1], int):
        files = [layer.source for layer in layers if layer.source != _COMMAND_LINE]
        return f"{files[-1]}: key '{key}' is missing; add it"
    wanted = {
        "model_type": "a section holds 'key: value' lines",
        "missing": "more values are wanted",
    }.get(first["type"], first["msg"].removeprefix("Value error, "))
    return f"{sources[-1]}: {key}: {first['input']!r} is not allowed: {wanted}"


def _nearest(key: str) -> str:
    """Find the known key whose last part is most like the given one's, then the whole key."""

    def likeness(known: str) -> tuple[float, float]:
        pairs = (known.rpartition(".")[2], key.rpartition(".")[2]), (known, key)
        last, whole = (difflib.SequenceMatcher(None, *pair).ratio() for pair in pairs)
        return last, whole

    return max(_keys(Config), key=likeness)


def _has(layer: Any, path: Sequence[str]) -> bool:
    """Whether a layer sets a key, or a part of it."""
    for part in path:
        if not isinstance(layer, dict):
            return True
        layer = {str(key): value for key, value in layer.items()}
        if part not in layer:
            return False
        layer = layer[part]
    return True


def _keys(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yield every dotted key of a section."""
    for name, field in section.model_fields.items():
        kinds = [field.annotation, *getattr(field.annotation, "__args__", ())]
        inner = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        yield prefix + name
        for kind in inner:
            yield from _keys(kind, f"{prefix}{name}.")
