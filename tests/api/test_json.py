"""JSON with orjson and without: the same text."""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import enum
import io
import uuid
from collections.abc import Iterator
from typing import Any

import pytest

from puff_patch import json


class Colour(enum.Enum):
    RED = "red"


@dataclasses.dataclass
class Point:
    x: int
    y: Any


UTC = datetime.timezone.utc
EQUAL = [
    ({"a": [1, 2.5, None, True, "ö"]}, '{"a":[1,2.5,null,true,"ö"]}'),
    (datetime.datetime(2024, 5, 6, 7, 8, 9, 10, UTC), '"2024-05-06T07:08:09.000010+00:00"'),
    (datetime.datetime(2024, 5, 6, 7, 8, 9), '"2024-05-06T07:08:09"'),
    ([datetime.date(2024, 5, 6), datetime.time(7, 8, 9)], '["2024-05-06","07:08:09"]'),
    (datetime.time(7, tzinfo=UTC), '"07:00:00+00:00"'),
    (uuid.UUID(int=5), '"00000000-0000-0000-0000-000000000005"'),
    (decimal.Decimal("1.50"), '"1.50"'),
    (Colour.RED, '"red"'),
    (Point(1, Point(2, {3})), '{"x":1,"y":{"x":2,"y":[3]}}'),
    ((1, frozenset()), "[1,[]]"),
    ({1: "a", None: "b", False: "c"}, '{"1":"a","null":"b","false":"c"}'),
    ([float("nan"), {"x": float("inf")}, Point(1, float("-inf"))], '[null,{"x":null},{"x":1,"y":null}]'),
    (2**80, "1208925819614629174706176"),
    ([2**80, {1, 2**80 + 1} - {1}, decimal.Decimal(1), float("nan")], f'[{2**80},[{2**80 + 1}],"1",null]'),
]


@pytest.fixture(params=["orjson", "standard library"], autouse=True)
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param == "orjson":
        assert json._orjson() is not None
    else:
        monkeypatch.setattr(json, "_orjson", lambda: None)
    return request.param


@pytest.mark.parametrize(("value", "text"), EQUAL, ids=[text[:30] for _, text in EQUAL])
def test_what_is_written(value: object, text: str) -> None:
    assert json.dumps(value) == text
    assert json.dumpb(value) == text.encode()


def test_options() -> None:
    assert json.dumps({"b": 1, "a": [2]}, indent=True, sort_keys=True) == '{\n  "a": [\n    2\n  ],\n  "b": 1\n}'
    assert json.dumps([1j, b""], default=repr) == '["1j","b\'\'"]'
    with pytest.raises(TypeError, match="JSON has nothing for a complex"):
        json.dumps(1j)
    with pytest.raises(TypeError, match="decode it first"):
        json.dumpb({"a": b"bytes"})
    circular: list[Any] = []
    circular.append(circular)
    with pytest.raises(TypeError):
        json.dumps(circular)
    file = io.StringIO()
    json.dump({"a": 1}, file)
    assert file.getvalue() == '{"a":1}'
    assert json.load(io.BytesIO(b'{"a":1}')) == {"a": 1}


def test_what_is_read() -> None:
    for read in (json.loads, json.loadb):
        for text in ('{"a":["ö",1]}', '{"a":["ö",1]}'.encode(), bytearray('{"a":["ö",1]}'.encode())):
            assert read(text) == {"a": ["ö", 1]}
    for wrong in ("", "{", "NaN", b"\xff", b'"\xff"', "[1] 2"):
        with pytest.raises(json.JSONDecodeError):
            json.loads(wrong)
