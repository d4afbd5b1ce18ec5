"""Dataclasses as schemas: a field is a key of puff.toml, a variable of the environment and an option of a command.

What a field takes is read from its annotation, what it means from the ``Args:`` of its class's docstring.  A field
that none of the three can write down (a callable, for one) is no `Key`.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

T = TypeVar("T")
Location = tuple[Any, ...]
"""The keys and indexes that lead to a value in nested tables and lists."""

TRUE = frozenset({"1", "true", "yes", "on"})
FALSE = frozenset({"0", "false", "no", "off"})


class Mismatch(ValueError):
    """A value does not fit.

    Args:
        message: says what fits, after the name of the key.
        location: where it is, below what was checked.
        complete: whether the message names the key itself.
    """

    def __init__(self, message: str, location: Location = (), *, complete: bool = False) -> None:
        super().__init__(message)
        self.location = location
        self.complete = complete


@dataclass(frozen=True)
class Kind:
    """What a field takes.

    Args:
        takes: in words, e.g. ``"a whole number"``.
        check: turns a value of TOML or JSON into the field's; raises `Mismatch`.
        parse: does so with the text of a variable or an option; None if it cannot be written there.
        show: the text of a value in a help text.
        flag: whether it is true or false.
        table: the dataclass, if it is a table.
        tables: the dataclass, if it is a list of tables.
    """

    takes: str
    check: Callable[[Any], Any]
    parse: Callable[[str], Any] | None = None
    show: Callable[[Any], str] = str
    flag: bool = False
    table: type[Any] | None = None
    tables: type[Any] | None = None


@dataclass(frozen=True)
class Key:
    """One field of a schema.

    Args:
        name: of the field.
        kind: what it takes.
        default: the field's default, or ``dataclasses.MISSING``.
        help: what it means, in one line.
        secret: not to be shown, and no option of a command, which other users of the machine can read.
    """

    name: str
    kind: Kind
    default: Any
    help: str
    secret: bool

    @property
    def option(self) -> str:
        """Its name on the command line."""
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        """Its name in the environment."""
        return f"PUFF_{self.name.upper()}"


_keys: dict[type[Any], Mapping[str, Key]] = {}


def keys(cls: type[Any]) -> Mapping[str, Key]:
    """The keys of a dataclass by name, in order."""
    if cls in _keys:
        return _keys[cls]
    described = _described(cls)
    found = {}
    for field in dataclasses.fields(cls):
        annotation = _annotation(cls, field)
        kind = None if annotation is None or not field.init else _kind(annotation)
        if kind is not None:
            default = field.default if field.default_factory is MISSING else field.default_factory()
            secret = not field.repr
            found[field.name] = Key(field.name, kind, default, described.get(field.name, ""), secret)
    return _keys.setdefault(cls, types.MappingProxyType(found))


def check(
    values: Mapping[str, Any], allowed: Mapping[str, Key], aliases: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Check a table against its keys; return what the fields take.

    Args:
        values: the table, as TOML or JSON has it.
        allowed: its keys.
        aliases: other names that some of them have.

    Raises:
        Mismatch: a key is unknown, or its value does not fit.
    """
    found = {}
    aliases = aliases or {}
    for name, value in values.items():
        key = allowed.get(aliases.get(name, name))
        if key is None:
            raise Mismatch(f"unknown key {name!r}{nearest(name, [*allowed, *aliases])}", (name,), complete=True)
        try:
            found[key.name] = key.kind.check(value)
        except Mismatch as error:
            message = str(error) if error.complete else f"{name} {error}"
            raise Mismatch(message, (name, *error.location), complete=True) from None
    return found


def build(cls: type[T], values: Mapping[str, Any]) -> T:
    """A dataclass from a table.

    Its class may have ``ALIASES``, other names of its fields.

    Raises:
        Mismatch: a key is unknown or missing, or a value does not fit or is refused by the dataclass.
    """
    allowed = keys(cls)
    found = check(values, allowed, getattr(cls, "ALIASES", {}))
    for key in allowed.values():
        if key.default is MISSING and key.name not in found:
            raise Mismatch(f"{key.name} is missing here", complete=True)
    try:
        return cls(**found)
    except Mismatch:
        raise
    except ValueError as error:
        raise Mismatch(str(error), mentioned(str(error), values), complete=True) from None


def parse(key: Key, text: str) -> Any:
    """A field's value from the text of a variable or an option.

    Raises:
        Mismatch: it does not fit; the message begins with what it takes.
    """
    assert key.kind.parse is not None
    try:
        return key.kind.parse(text)
    except ValueError:
        shown = "something else" if key.secret else repr(text)
        raise Mismatch(f"takes {key.kind.takes}, got {shown}") from None


def nearest(name: str, names: Iterable[str]) -> str:
    """What to say after the name of something unknown: the nearest of those there are, or all of few."""
    names = list(names)
    if near := difflib.get_close_matches(name, names, n=1):
        return f"; did you mean {near[0]!r}?"
    return f"; it takes {', '.join(names)}" if 0 < len(names) <= 12 else ""


def mentioned(message: str, names: Iterable[str]) -> Location:
    """The name that a message speaks of, as a location; empty if of none."""
    return next(((name,) for name in names if re.search(rf"\b{re.escape(name)}\b", message)), ())


def flag(text: str) -> bool:
    """The usual words for true and false."""
    word = text.strip().lower()
    if word in TRUE or word in FALSE:
        return word in TRUE
    raise ValueError(text)


def shown(value: Any) -> str:
    """A value as TOML has it, roughly."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return "a table"
    return repr(value)


def _described(cls: type[Any]) -> dict[str, str]:
    """What the ``Args:`` of a docstring say of each field, in one line without markup."""
    found: dict[str, str] = {}
    for each in reversed(cls.__mro__):
        section = re.search(r"^Args:\n(.*?)(?=^\S|\Z)", inspect.cleandoc(each.__doc__ or ""), re.S | re.M)
        for entry in re.finditer(r"^    (\w+): (.*(?:\n {5,}.*)*)", section[1] if section else "", re.M):
            text = " ".join(entry[2].split())
            found[entry[1]] = re.sub(r"``(.*?)``", r"\1", re.sub(r"(?<!`)`([^`]+)`(?!`)", r"\1", text))
    return found


def _annotation(cls: type[Any], field: dataclasses.Field[Any]) -> Any:
    """A field's type; None if it is only known to type checkers, and so is nothing that can be written down."""
    if not isinstance(field.type, str):
        return field.type
    owner = next(each for each in cls.__mro__ if field.name in inspect.get_annotations(each))
    try:
        return eval(field.type, vars(sys.modules[owner.__module__]))
    except NameError:
        return None


def _kind(annotation: Any) -> Kind | None:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation in _SCALARS:
        return _SCALARS[annotation]
    if dataclasses.is_dataclass(annotation):
        return _table(typing.cast("type[Any]", annotation))
    if origin in (Union, types.UnionType):
        inner = [_kind(each) for each in arguments if each is not types.NoneType]
        return inner[0] if len(inner) == 1 else None
    if origin is Literal:
        return _choice(arguments)
    if origin is tuple and len(arguments) == 2 and arguments[1] is Ellipsis:
        item = _kind(arguments[0])
        return None if item is None else _tables(item) if item.table else _list(item)
    if origin is not None and issubclass(origin, Mapping) and arguments[0] is str:
        value = _kind(arguments[1])
        return None if value is None or value.parse is None else _mapping(value)
    return None


def _scalar(takes: str, check: Callable[[Any], Any], parse: Callable[[str], Any], **options: Any) -> Kind:
    def checked(value: Any) -> Any:
        try:
            return check(value)
        except ValueError:
            raise Mismatch(f"takes {takes}, got {shown(value)}") from None

    return Kind(takes, checked, parse, **options)


def _must(condition: bool, value: T) -> T:
    if not condition:
        raise ValueError(value)
    return value


def _number(value: float) -> float:
    return _must(abs(value) < float("inf"), float(value))


_SCALARS: dict[Any, Kind] = {
    bool: _scalar(
        "true or false",
        lambda value: _must(isinstance(value, bool), value),
        flag,
        show=lambda value: str(value).lower(),
        flag=True,
    ),
    int: _scalar(
        "a whole number", lambda value: _must(isinstance(value, int) and not isinstance(value, bool), value), int
    ),
    float: _scalar(
        "a number",
        lambda value: _number(_must(isinstance(value, (int, float)) and not isinstance(value, bool), value)),
        lambda text: _number(float(text)),
        show=lambda value: f"{value:g}",
    ),
    str: _scalar("a text", lambda value: _must(isinstance(value, str), value), str),
    Path: _scalar("a path", lambda value: Path(_must(isinstance(value, (str, Path)), value)), Path),
}


def _choice(words: tuple[Any, ...]) -> Kind:
    takes = ", ".join(f'"{word}"' for word in words[:-1]) + f' or "{words[-1]}"'

    def one(value: Any) -> Any:
        return _must(value in words, value)

    return _scalar(takes, one, one)


def _list(item: Kind) -> Kind:
    takes = "a list of texts" if item is _SCALARS[str] else f"a list, each {item.takes}"

    def check(value: Any) -> Any:
        if isinstance(value, str) and item.parse is not None:
            value = [value]
        if not isinstance(value, (list, tuple)):
            raise Mismatch(f"takes {takes}, got {shown(value)}")
        try:
            return tuple(item.check(each) for each in value)
        except Mismatch:
            raise Mismatch(f"takes {takes}, got {value!r}") from None

    def parse(text: str) -> Any:
        assert item.parse is not None
        return tuple(item.parse(part) for each in text.split(",") if (part := each.strip()))

    return Kind(takes, check, parse if item.parse else None, show=lambda value: ",".join(map(item.show, value)))


def _mapping(value: Kind) -> Kind:
    takes = f"a table of names, each with {value.takes}"

    def check(table: Any) -> Any:
        if not isinstance(table, Mapping):
            raise Mismatch(f"takes {takes}, got {shown(table)}")
        found = {}
        for name, each in table.items():
            try:
                found[name] = value.check(each)
            except Mismatch as error:
                raise Mismatch(f"{name} {error}", (name,)) from None
        return found

    def parse(text: str) -> Any:
        assert value.parse is not None
        pairs = [part.partition("=") for each in text.split(",") if (part := each.strip())]
        return {_must(bool(middle), name.strip()): value.parse(rest.strip()) for name, middle, rest in pairs}

    def show(table: Any) -> str:
        return ",".join(f"{name}={value.show(each)}" for name, each in table.items())

    return Kind("NAME=VALUE,...", check, parse, show=show)


def _table(cls: type[Any]) -> Kind:
    def check(value: Any) -> Any:
        if isinstance(value, cls):
            return value
        if not isinstance(value, Mapping):
            raise Mismatch(f"takes a table, got {shown(value)}")
        return build(cls, value)

    return Kind("a table", check, table=cls)


def _tables(item: Kind) -> Kind:
    def check(value: Any) -> Any:
        if not isinstance(value, (list, tuple)):
            raise Mismatch(f"takes tables, each under [[...]], got {shown(value)}")
        found = []
        for index, each in enumerate(value):
            try:
                found.append(item.check(each))
            except Mismatch as error:
                raise Mismatch(str(error), (index, *error.location), complete=error.complete) from None
        return tuple(found)

    return Kind("a list of tables", check, tables=item.table)
