"""``ENGINE = "django_backend.postgresql"``: Django's PostgreSQL backend on puff_patch's pool.

With no NAME, HOST, USER and so on, the server is the one puff_patch is configured for under the alias's name
(``PUFF_<ALIAS>_POSTGRES_URL``, the embedded one, or localhost).  ``OPTIONS["pool"]`` takes the pool options of
`puff_patch.config.PoolOptions`, or False for connections of their own; with psycopg2 and with psycopg 3.  Where it
says nothing, what ``[[postgres]]`` of puff.toml says of the alias counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from django.core.exceptions import ImproperlyConfigured
from django.db.backends.base.base import NO_DB_ALIAS
from django.db.backends.postgresql import base

from django_backend import conf
from puff_patch.config import ConfigError, PoolOptions, current
from puff_patch.patches.django import driver, with_setup

# What psycopg_pool takes and Django passes on to it, and our pool has no use for.
_OF_PSYCOPG_POOL = frozenset(
    {
        *("check", "close_returns", "configure", "connection_class", "kwargs", "name", "num_workers", "open"),
        *("reconnect_failed", "reconnect_timeout", "reset"),
    }
)
#: The setting of DATABASES for each parameter of libpq that says which server.
SERVER_SETTINGS = {"dbname": "NAME", "user": "USER", "password": "PASSWORD", "host": "HOST", "port": "PORT"}


class DatabaseWrapper(base.DatabaseWrapper):
    """Django's, with the server from puff_patch's configuration and leases from its pool."""

    _checked_pool: object = None
    _pool_argument: object = True
    _wrong_configuration: ConfigError | None = None

    def __init__(self, settings_dict: dict[str, Any], alias: str = "default") -> None:
        conf.install()  # where django_backend is no installed app
        named = any(settings_dict.get(key) for key in SERVER_SETTINGS.values())
        # Django's connection without a database, to create one, has the server of the one it was made from.
        if not named and not settings_dict["OPTIONS"].get("service") and alias != NO_DB_ALIAS:
            try:
                use_configured_server(settings_dict, alias)
            except ConfigError as error:
                # Models are imported before `manage.py check` can say so, and make this object.
                self._wrong_configuration = error
        super().__init__(settings_dict, alias)

    @property
    def pool(self) -> None:
        """Django's pool, which is psycopg_pool's: never here, ours is behind the driver's ``connect``."""
        return None

    def get_connection_params(self) -> dict[str, Any]:
        """Django's parameters for ``connect``; the pool's options are no business of others who ask for them.

        Raises:
            ImproperlyConfigured: `puff_patch.patch_all` was not called, or its configuration is wrong.
        """
        if self._wrong_configuration is not None:
            raise ImproperlyConfigured(str(self._wrong_configuration)) from self._wrong_configuration
        options = self.settings_dict["OPTIONS"]
        # Django takes the option for its own pool, or refuses it: not knowing of ours.
        self.settings_dict["OPTIONS"] = {key: value for key, value in options.items() if key != "pool"}
        try:
            params = super().get_connection_params()
        finally:
            self.settings_dict["OPTIONS"] = options
        if not driver().is_patched():
            raise ImproperlyConfigured(
                'ENGINE "django_backend.postgresql" needs `import puff_patch; puff_patch.patch_all()` in the '
                "first lines of manage.py and wsgi.py."
            )
        return params

    def get_new_connection(self, conn_params: dict[str, Any]) -> Any:
        """A lease from the pool.

        Raises:
            ImproperlyConfigured: ``OPTIONS["pool"]`` is wrong.
        """
        pool = self.settings_dict["OPTIONS"].get("pool", True)
        if pool is not self._checked_pool:  # to look at it costs half as much as a lease
            pool_options(self.alias, pool)
            said = {**_options_by_name(self.alias), **(pool if isinstance(pool, Mapping) else {})}
            self._pool_argument = pool and (said or True)
            self._checked_pool = pool
        return super().get_new_connection(with_setup(self, {**conn_params, "pool": self._pool_argument}))


def pool_options(alias: str, pool: object) -> PoolOptions | None:
    """What ``OPTIONS["pool"]`` of DATABASES means; None for connections of their own.

    Args:
        alias: of DATABASES.
        pool: the option: a mapping of pool options, True or False.

    Raises:
        ImproperlyConfigured: it is wrong.
    """
    where = f'DATABASES[{alias!r}]["OPTIONS"]["pool"]'
    if isinstance(pool, Mapping):
        if strange := sorted(_OF_PSYCOPG_POOL.intersection(pool)):
            raise ImproperlyConfigured(
                f"{where}: {', '.join(map(repr, strange))} means something to psycopg_pool only, and this "
                f'pool is puff_patch\'s: leave it out, or use ENGINE "django.db.backends.postgresql"'
            )
        try:
            return current().postgres_pool.merged({**_options_by_name(alias), **pool}, where=where)
        except ConfigError as error:
            raise ImproperlyConfigured(str(error)) from error
    if pool is True or pool is False:
        return current().postgres_pool_options(alias) if pool else None
    raise ImproperlyConfigured(f"{where} takes pool options, True or False, got {pool!r}")


def _options_by_name(alias: str) -> Mapping[str, Any]:
    """What ``[[postgres]]`` of puff.toml says of the pool of this name."""
    return current().postgres_pools.get(alias.lower(), {})


def use_configured_server(settings_dict: dict[str, Any], alias: str) -> None:
    """Fill NAME, HOST, ... in place, as if they had been written in settings; test databases need NAME."""
    from psycopg2.extensions import parse_dsn

    parameters = parse_dsn(current().postgres_url(alias))
    for parameter, setting in SERVER_SETTINGS.items():
        settings_dict[setting] = parameters.pop(parameter, "")
    settings_dict["OPTIONS"] = {**parameters, **settings_dict["OPTIONS"]}
