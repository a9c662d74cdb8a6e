"""JSON files that this package wrote, read back: what cannot have been written so is an error that names it."""

import json
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints


def read_json(path: str | Path) -> Any:
    """The content of a JSON file.

    Raises:
        ValueError: it is not JSON, or nested too deeply.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON ({error})") from None


def parse(value: Any, kind: Any, name: str) -> Any:
    """A JSON value as what a type annotation says.

    Args:
        value: of JSON.
        kind: a dataclass, a plain type, a list of a kind, a dict of any values, or one of them or None.
        name: what the error calls it.

    Raises:
        ValueError: it is something else.
    """
    if isinstance(kind, UnionType):
        if value is None and NoneType in get_args(kind):
            return None
        kind = next(option for option in get_args(kind) if option is not NoneType)
    if is_dataclass(kind) and isinstance(value, dict):
        kinds = {field.name: get_type_hints(kind)[field.name] for field in fields(kind)}
        for unknown in value.keys() - kinds.keys():
            raise ValueError(f"{name} has the unknown field {unknown!r}")
        try:
            return kind(**{field: parse(item, kinds[field], f"{name}.{field}") for field, item in value.items()})
        except TypeError as error:  # a field is missing
            raise ValueError(f"{name}: {error}") from None
    if get_origin(kind) is list and isinstance(value, list):
        return [parse(item, get_args(kind)[0], f"{name}[{index}]") for index, item in enumerate(value)]
    plain = get_origin(kind) or kind
    if plain is float and type(value) is int and abs(value) < 2**63:
        return float(value)
    if type(value) is plain and plain is not list and not (plain is int and abs(value) >= 2**63):
        return value
    raise ValueError(f"{name} must be {getattr(kind, '__name__', kind)}; it is {value!r:.80}")
