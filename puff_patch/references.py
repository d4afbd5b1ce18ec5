"""Objects by name, as puff.toml names applications: ``"module.attribute"`` or ``"module:attribute"``."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

from puff_patch.config import ConfigError
from puff_patch.schema import nearest


def load(reference: str, *, what: str, where: str) -> Any:
    """Import something callable.

    Args:
        reference: its name.
        what: what it is for; the key that names it.
        where: where it is named, to begin an error with.

    Raises:
        ConfigError: there is no such module or attribute, or it is not callable.
        Exception: what the module raises while it is imported.
    """

    def wrong(problem: str) -> ConfigError:
        return ConfigError(f"{where}: {what} names {reference!r}, but {problem}")

    module_name, colon, attributes = reference.partition(":")
    if not colon:
        module_name, _, attributes = reference.rpartition(".")
    if not module_name or not attributes:
        raise wrong('it takes "module.attribute" or "module:attribute"')
    try:
        found = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # Not one that the module itself imports in vain.
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        looked = sys.path[0] or os.getcwd()
        raise wrong(
            f"there is no module {error.name!r}; it was looked for in {looked} and where Python looks"
        ) from None
    for attribute in attributes.split("."):
        try:
            found = getattr(found, attribute)
        except AttributeError:
            place = f"{module_name} ({getattr(sys.modules[module_name], '__file__', None)})"
            hint = nearest(attribute, [name for name in dir(found) if not name.startswith("_")])
            raise wrong(f"{place} has no {attribute!r}{hint if 'did you mean' in hint else ''}") from None
    if not callable(found):
        raise wrong(f"that is not callable but {type(found).__name__}")
    return found
