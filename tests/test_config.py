"""The configuration, read from an environment."""

from __future__ import annotations

from pathlib import Path

import pytest

from puff_patch import config
from puff_patch.config import Config, ConfigError, HttpClientOptions, PoolOptions


def test_an_empty_environment_gives_the_documented_defaults() -> None:
    found = Config.from_env({})
    assert found == Config()
    assert found.postgres_url() == "postgres://postgres:password@localhost:5432/postgres"
    assert found.redis_url() == "redis://localhost:6379"
    assert found.data_dir == Path(".puff")
    assert not found.embedded


def test_urls_are_found_by_service_name() -> None:
    found = Config.from_env(
        {
            "PUFF_DEFAULT_POSTGRES_URL": "postgres://a/b",
            "PUFF_READ_REPLICA_POSTGRES_URL": "postgres://c/d",
            "PUFF_DEFAULT_REDIS_URL": "redis://e",
            "PUFF_SESSIONS_REDIS_URL": "",
            "OTHER_POSTGRES_URL": "postgres://not/ours",
        }
    )
    assert found.postgres_url() == "postgres://a/b"
    assert found.postgres_url("read_replica") == "postgres://c/d"
    assert found.postgres_url("Read_Replica") == "postgres://c/d", "aliases in settings may have capitals"
    assert found.postgres_url("other") == config.DEFAULT_POSTGRES_URL
    assert found.redis_url() == "redis://e"
    assert found.redis_url("sessions") == config.DEFAULT_REDIS_URL


def test_the_environment_is_read_anew_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PUFF_DEFAULT_REDIS_URL", "redis://first")
    assert config.current().redis_url() == "redis://first"
    monkeypatch.setenv("PUFF_DEFAULT_REDIS_URL", "redis://second")
    assert config.current().redis_url() == "redis://second"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        *[("1", True), ("true", True), (" Yes ", True), ("ON", True)],
        *[("0", False), ("", False), ("false", False), ("No", False), ("off", False)],
    ],
)
def test_embedded_takes_the_usual_words(value: str, expected: bool) -> None:
    assert Config.from_env({"PUFF_EMBEDDED": value}).embedded is expected


def test_embedded_refuses_other_words() -> None:
    with pytest.raises(ConfigError, match="PUFF_EMBEDDED takes 1 or 0, got 'maybe'"):
        Config.from_env({"PUFF_EMBEDDED": "maybe"})


def test_data_dir(tmp_path: Path) -> None:
    assert Config.from_env({"PUFF_DATA_DIR": str(tmp_path)}).data_dir == tmp_path
    assert Config.from_env({"PUFF_DATA_DIR": ""}).data_dir == Path(".puff")


@pytest.mark.parametrize(
    ("environ", "pooled"),
    [
        ({}, {"reporting", "shop"}),
        ({"PUFF_POSTGRES_POOL": "", "PUFF_POSTGRES_UNPOOLED": " , "}, {"reporting", "shop"}),
        ({"PUFF_POSTGRES_POOL": "1"}, {"reporting", "shop"}),
        ({"PUFF_POSTGRES_POOL": "0"}, set()),
        ({"PUFF_POSTGRES_UNPOOLED": "postgres://me@db:5432/reporting"}, {"shop"}),
        ({"PUFF_POSTGRES_UNPOOLED": "*/none, postgres://*@db:5432/report*"}, {"shop"}),
        ({"PUFF_POSTGRES_UNPOOLED": "*/Reporting"}, {"reporting", "shop"}),
        ({"PUFF_POSTGRES_UNPOOLED": "*"}, set()),
    ],
)
def test_pooling_can_be_turned_off_for_all_servers_or_some(environ: dict[str, str], pooled: set[str]) -> None:
    found = Config.from_env(environ)
    assert {
        name for name in ("reporting", "shop") if found.pools_postgres(f"postgres://me@db:5432/{name}")
    } == pooled


def test_wrong_switches_of_pooling_are_refused() -> None:
    with pytest.raises(ConfigError, match="PUFF_POSTGRES_POOL takes 1 or 0, got 'none'"):
        Config.from_env({"PUFF_POSTGRES_POOL": "none"})
    with pytest.raises(ConfigError, match=r"PUFF_POSTGRES_UNPOOLED takes patterns.*got 'reporting'"):
        Config.from_env({"PUFF_POSTGRES_UNPOOLED": "*/shop,reporting"})


def test_pool_options_of_each_kind() -> None:
    found = Config.from_env(
        {
            "PUFF_POSTGRES_POOL_MAX_SIZE": "7",
            "PUFF_POSTGRES_POOL_TIMEOUT": "1.5",
            "PUFF_REDIS_POOL_MAX_WAITING": "100",
            "PUFF_REDIS_BLOCKING_POOL_MAX_SIZE": "7",
            "PUFF_HTTP_POOL_MAX_IDLE": "30",
        }
    )
    assert found.postgres_pool == PoolOptions(max_size=7, timeout=1.5)
    assert found.redis_pool == PoolOptions(max_size=100, max_waiting=100)
    assert found.redis_blocking_pool == PoolOptions(max_size=7, max_idle=60)
    assert found.http_pool == PoolOptions(max_size=100, max_idle=30)


@pytest.mark.parametrize(
    ("variable", "value", "told"),
    [
        ("PUFF_POSTGRES_POOL_MAX_SISE", "7", "'max_sise'; did you mean 'max_size'"),
        ("PUFF_REDIS_POOL_XYZ", "7", "'xyz'; it takes min_size, max_size, timeout"),
        ("PUFF_HTTP_POOL_MAX_SIZE", "many", "max_size takes a number, got 'many'"),
        ("PUFF_HTTP_POOL_MAX_SIZE", "2.5", "max_size takes a number, got '2.5'"),
        ("PUFF_HTTP_POOL_MAX_SIZE", "0", "max_size"),
        ("PUFF_HTTP_POOL_MIN_SIZE", "-1", "min_size"),
        ("PUFF_HTTP_POOL_TIMEOUT", "0", "timeout must be a positive number"),
        ("PUFF_HTTP_POOL_TIMEOUT", "nan", "timeout must be a positive number"),
        ("PUFF_HTTP_POOL_MAX_WAITING", "-1", "max_waiting"),
    ],
)
def test_wrong_pool_options_are_named_with_their_source(variable: str, value: str, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Config.from_env({variable: value})
    assert told in str(caught.value)
    kind = variable.split("_")[1]
    assert f"PUFF_{kind}_POOL" in str(caught.value)


def test_merged_options_keep_what_is_not_named() -> None:
    base = PoolOptions(max_size=40, timeout=2)
    assert base.merged({"min_size": 20}, where="here") == PoolOptions(min_size=20, max_size=40, timeout=2)
    for wrong in ({"max_sizes": 1}, {"max_size": 0}, {"timeout": None}):
        with pytest.raises(ConfigError, match=f"^here: .*{next(iter(wrong))}"):
            base.merged(wrong, where="here")


def test_thresholds_of_the_warnings() -> None:
    assert (Config.from_env({}).slow_checkout_ms, Config.from_env({}).blocked_hub_ms) == (1000, None)
    config = Config.from_env({"PUFF_SLOW_CHECKOUT_MS": "0", "PUFF_BLOCKED_HUB_MS": "12.5"})
    assert (config.slow_checkout_ms, config.blocked_hub_ms) == (0, 12.5)


def test_blocking_threads_and_http_clients() -> None:
    assert Config.from_env({}).blocking_threads == 32
    assert Config.from_env({"PUFF_BLOCKING_THREADS": "4"}).blocking_threads == 4
    for wrong in ("0", "-1", "many", "1.5"):
        with pytest.raises(ConfigError, match="PUFF_BLOCKING_THREADS takes a whole number"):
            Config.from_env({"PUFF_BLOCKING_THREADS": wrong})
    config = Config(http_clients={"internal": HttpClientOptions(http2_prior_knowledge=True)})
    assert config.http_client("Internal").http2_prior_knowledge
    assert config.http_client() == HttpClientOptions() == config.http_client("unknown")
    for options in ({"timeout": 0}, {"connect_timeout": -1}, {"max_connections": 0}, {"max_keepalive": -1}):
        with pytest.raises(ConfigError, match=next(iter(options))):
            HttpClientOptions(**options)
    for wrong in ("-1", "nan", "inf", "soon"):
        with pytest.raises(ConfigError, match=f"PUFF_BLOCKED_HUB_MS takes a number of milliseconds.*{wrong}"):
            Config.from_env({"PUFF_BLOCKED_HUB_MS": wrong})


def test_the_token_is_not_shown() -> None:
    assert "hush" not in repr(Config.from_env({"PUFF_METRICS_TOKEN": "hush"}))
