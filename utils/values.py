"""The values that settings are made of, and what is allowed of them."""

from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, PlainValidator

Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]


def _ordered(numbers: tuple[float, float]) -> tuple[float, float]:
    if numbers[0] > numbers[1]:
        raise ValueError("the smaller number comes first")
    return numbers


def _distinct(names: list[str]) -> list[str]:
    if len(set(names)) < len(names):
        raise ValueError("two classes have one name")
    return names


def _file_id(key: Any) -> int | str:
    if key == "other" or (type(key) is int and 0 <= key <= 65535):
        return key
    if isinstance(key, str) and key.isdecimal():  # on the command line, and in a kept config
        return _file_id(int(key))
    raise ValueError("ids in mask files go from 0 to 65535; 'other' stands for all that remain")


def _class(value: Any) -> int | str | None:
    if value is None or isinstance(value, str) or (type(value) is int and value >= 0):
        return value
    raise ValueError("a class is its name or its id; null is ignored")


Range = Annotated[tuple[Positive, Positive], AfterValidator(_ordered)]

ClassNames = Annotated[list[str], Field(min_length=2, max_length=255), AfterValidator(_distinct)]
FileId = Annotated[int, Field(ge=0, le=65535)]
FileIds = Annotated[list[FileId], BeforeValidator(lambda x: x if isinstance(x, list) else [x])]
ClassMap = dict[
    Annotated[int | str, PlainValidator(_file_id)],
    Annotated[int | str | None, PlainValidator(_class)],
]
