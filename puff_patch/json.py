"""JSON, by orjson where that is installed (``pip install 'puff-patch[json]'``), else by the standard library.

Either way the text is the same: compact, UTF-8, not escaped.  Beyond what JSON has, these are written:

* ``datetime``, ``date`` and ``time`` as in ISO 8601 (``2024-05-06T07:08:09.000010+00:00``),
* ``UUID`` and ``Decimal`` as strings, an ``Enum`` as its value, a dataclass as an object,
* sets as arrays, keys that are numbers, booleans or None as `json.dumps` writes them,
* NaN and infinities as ``null``, which JSON has no numbers for.

They are read as what JSON has: strings stay strings.  Anything else is a TypeError unless ``default`` knows it.
"""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import enum
import functools
import json
import math
import uuid
from collections.abc import Callable
from typing import IO, Any

Default = Callable[[Any], Any]

JSONDecodeError = json.JSONDecodeError


@functools.cache
def _orjson() -> Any:
    try:
        import orjson
    except ImportError:
        return None
    return orjson


def dumpb(value: Any, *, default: Default | None = None, indent: bool = False, sort_keys: bool = False) -> bytes:
    """Python to JSON, as bytes.

    Args:
        value: what to write.
        default: called with what is not known here; what it returns is written in its place.
        indent: whether to write it for people, indented by two blanks.
        sort_keys: whether to write the keys of objects in order.

    Raises:
        TypeError: a value cannot be written.
    """
    orjson = _orjson()
    if orjson is not None:
        option = (orjson.OPT_INDENT_2 if indent else 0) | (orjson.OPT_SORT_KEYS if sort_keys else 0)
        try:
            return orjson.dumps(value, default=_default(default), option=option)  # type: ignore[no-any-return]
        except TypeError:
            pass  # big integers, keys that are no strings: what orjson refuses, the slower one may know
    return _dumps(value, default, indent, sort_keys).encode()


def dumps(value: Any, *, default: Default | None = None, indent: bool = False, sort_keys: bool = False) -> str:
    """Python to JSON, as text; see `dumpb`."""
    if _orjson() is None:
        return _dumps(value, default, indent, sort_keys)
    return dumpb(value, default=default, indent=indent, sort_keys=sort_keys).decode()


def dump(value: Any, file: IO[str], *, default: Default | None = None, indent: bool = False) -> None:
    """Python to JSON, into a text file; see `dumpb`."""
    file.write(dumps(value, default=default, indent=indent))


def loads(text: str | bytes | bytearray | memoryview) -> Any:
    """JSON to Python, from text or UTF-8.

    Raises:
        JSONDecodeError: it is not JSON; a ValueError.
    """
    orjson = _orjson()
    if orjson is not None:
        return orjson.loads(text)
    if not isinstance(text, str):
        try:
            text = bytes(text).decode()
        except UnicodeDecodeError as error:
            raise JSONDecodeError(f"it is not UTF-8: {error}", "", 0) from error
    return json.loads(text, parse_constant=_refuse)


def loadb(data: bytes | bytearray | memoryview | str) -> Any:
    """JSON to Python, from UTF-8 or text; see `loads`."""
    return loads(data)


def load(file: IO[Any]) -> Any:
    """JSON to Python, from a file; see `loads`."""
    return loads(file.read())


def _dumps(value: Any, default: Default | None, indent: bool, sort_keys: bool) -> str:
    def write(value: Any) -> str:
        return json.dumps(
            value,
            ensure_ascii=False,
            allow_nan=False,
            default=_default(default, known=True),
            indent=2 if indent else None,
            separators=(",", ": ") if indent else (",", ":"),
            sort_keys=sort_keys,
        )

    try:
        return write(value)
    except ValueError as error:
        if "circular" in str(error).lower():
            raise TypeError("the value contains itself") from None
        return write(_without_nan(value, default))


def _default(default: Default | None, *, known: bool = False) -> Default:
    def convert(value: Any) -> Any:
        if isinstance(value, decimal.Decimal):
            return str(value)
        if isinstance(value, (set, frozenset)):
            return list(value)
        if isinstance(value, enum.Enum):
            return value.value
        if isinstance(value, (datetime.datetime, datetime.date, datetime.time)):
            return value.isoformat()
        if known and isinstance(value, uuid.UUID):
            return str(value)
        if known and dataclasses.is_dataclass(value) and not isinstance(value, type):
            return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        if default is not None:
            return default(value)
        hint = "; decode it first" if isinstance(value, (bytes, bytearray, memoryview)) else ""
        raise TypeError(f"JSON has nothing for a {type(value).__qualname__}{hint}")

    return convert


def _without_nan(value: Any, default: Default | None) -> Any:
    """A copy with None for the numbers that JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _without_nan(item, default) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_without_nan(item, default) for item in value]
    if value is None or isinstance(value, (str, int)):
        return value
    return _without_nan(_default(default, known=True)(value), default)


def _refuse(name: str) -> Any:
    raise JSONDecodeError(f"JSON has no {name}", name, 0)
