"""puff.toml: what it may say, what is said of what it may not, and what wins over it."""

from __future__ import annotations

import re
import textwrap
from argparse import ArgumentParser
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from puff_patch import config, project, schema, serving
from puff_patch.cli.example import example
from puff_patch.config import Config, ConfigError, HttpClientOptions, PoolOptions
from puff_patch.project import Project, Source
from puff_patch.server import ServerOptions

# The files that Puff's README and its page on the command line show, one by one.
SEED = {
    "command": """
        [[commands]]
        function = "my_puff_proj_py.hello_world"
        command_name = "hello_world"
    """,
    "django": """
        django = true
        wsgi = "my_django_application.wsgi.application"

        [[postgres]]
        name = "default"

        [[redis]]
        name = "default"
    """,
    "graphql": """
        django = true
        pytest = true

        [[postgres]]
        enable = true

        [[redis]]
        enable = true

        [[pubsub]]
        enable = true

        [[graphql]]
        schema = "my_python_gql_app.Schema"
        url = "/graphql/"
        subscriptions_url = "/subscriptions/"
        playground_url = "/playground/"
    """,
    "pytest": "pytest = true",
    "asyncio": """
        asyncio = true
        asgi = "my_python_app.app"
    """,
    "tasks": """
        asyncio = true

        [[task_queue]]
        enable = true
    """,
    "http": """
        asyncio = true

        [[http_client]]
        http2_prior_knowledge = true
    """,
    "everything": """
        django = false
        greenlets = true
        asyncio = false
        dotenv = false
        add_cwd_to_path = true
        compression_middleware = true
        dotenv_path = '.env'
        pytest_path = './'
        wsgi = 'my_wsgi.app'
        asgi = 'my_asgi.app'

        [cors]
        base_config = 'Default'
        max_age_secs = 86400
        allow_credentials = true
        allowed_origins = ['http://localhost:7777']
        allowed_headers = '*'
        allowed_methods = ['GET']

        [[commands]]
        function = 'my_python_mod.some_func'
        command_name = 'execute_func'

        [[postgres]]
        name = 'default'

        [[redis]]
        name = 'default'

        [[pubsub]]
        name = 'default'

        [[task_queue]]
        name = 'default'
        pool_size = 10
        max_concurrent_tasks = 100

        [[http_client]]
        name = 'default'
        http2_prior_knowledge = true
        max_idle_connections = 100
        user_agent = 'puff/0.1.0'

        [[graphql]]
        name = 'default'
        schema = 'my_python_mod.Schema'
        url = '/graphql/'
        database = 'default'
        subscription_url = '/subscriptions/'
        playground_url = '/playground/'
    """,
    "services": """
        [[postgres]]
        name = "default"

        [[postgres]]
        name = "readonly"

        [[postgres]]
        name = "audit"

        [[redis]]
        name = "default"

        [[redis]]
        name = "other"

        [[http_client]]
        name = "default"

        [[http_client]]
        name = "internal"
        http2_prior_knowledge = true

        [[pubsub]]
        name = "default"

        [[pubsub]]
        name = "otherpubsub"

        [[graphql]]
        schema = "my_python_gql_app.Schema"
        url = "/graphql/"
        subscriptions_url = "/subscriptions/"
        playground_url = "/playground/"
        database = "readonly"

        [[graphql]]
        name = "audit"
        schema = "my_python_gql_app.AuditSchema"
        url = "/audit/graphql/"
        subscriptions_url = "/audit/subscriptions/"
        playground_url = "/audit/playground/"
        database = "audit"
    """,
}


@pytest.fixture
def load(tmp_path: Path) -> Any:
    def load(text: str) -> Project:
        path = tmp_path / "puff.toml"
        path.write_text(textwrap.dedent(text))
        return project.load(path)

    return load


@pytest.mark.parametrize("name", SEED)
def test_the_files_of_the_seed_are_right(load: Any, name: str) -> None:
    found = load(SEED[name])
    assert set(found.values) == set(re.findall(r"^\s*(?:\[+)?(\w+)(?= = |\]+$)", SEED[name], re.M)) & set(
        project.allowed_keys()
    )


def test_what_the_seeds_files_mean(load: Any) -> None:
    services = load(SEED["services"])
    assert services.config.http_client("internal") == HttpClientOptions(http2_prior_knowledge=True)
    assert services.config.http_client() == services.config.http_client("unheard-of") == HttpClientOptions()
    assert services.config.graphql["audit"].subscription_url == "/audit/subscriptions/"
    assert (services.config.graphql["default"].database, services.config.graphql["audit"].database) == (
        "readonly",
        "audit",
    )
    everything = load(SEED["everything"])
    assert everything.config.http_client().max_keepalive == 100
    assert everything.config.http_client().user_agent == "puff/0.1.0"
    assert everything.config.task_queues["default"].max_concurrent_tasks == 100
    assert everything.program.cors.allowed_headers == ("*",)
    assert everything.program.commands[0].command_name == "execute_func"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('# a comment\n\nwsgi = "app.app"\nport = "two"\n', "line 4: port takes a whole number, got 'two'"),
        ("max_greenlet = 3", "line 1: unknown key 'max_greenlet'; did you mean 'max_greenlets'?"),
        ("django = 1", "line 1: django takes true or false, got 1"),
        ("port = true", "line 1: port takes a whole number, got true"),
        ("client_timeout = inf", "line 1: client_timeout takes a number, got inf"),
        ('[cors]\nmax_age_secs = 1\nmax_age_sec = 3\n', "line 3: unknown key 'max_age_sec'; did you mean"),
        ('[cors]\nbase_config = "default"', '"Default", "Permissive" or "VeryPermissive", got \'default\''),
        ('[[postgres]]\nenable = true\n[[postgres]]\nname = "b"\npoolsize = 2', "line 5: unknown key 'poolsize'"),
        ("[[postgres]]\n[[postgres]]\nenable = true", "line 2: there are two [[postgres]] named 'default'"),
        ('[[redis]]\nname = "a-b"', "line 2: name is made of letters, digits and _, unlike 'a-b'"),
        ("postgres = true", "line 1: postgres takes tables, each under [[...]], got true"),
        ("[[postgres]]\nmin_size = 20", "line 1: PostgreSQL 'default': pool sizes must satisfy"),
        ("\n[redis_pool]\nmax_sise = 3", "line 3: unknown key 'max_sise'; did you mean 'max_size'"),
        ('[[graphql]]\nname = "a"\n', "line 1: schema is missing here"),
        ('[[graphql]]\nschema = "a.b"\nurl = "graphql"', "line 3: url is a path and begins with '/'"),
        ('asgi_paths = [\n  "/a",\n  2,\n]\n', "line 1: asgi_paths takes a list of texts"),
        ('[[commands]]\nfunction = "a.b"\ncommand_name = "serve"', "line 3: command_name 'serve' is a command"),
        ('[[commands]]\nfunction = "a.b"', "line 1: command_name is missing here"),
        ('[[websocket]]\npath = "chat"\nhandler = "a.b"', "line 2: path begins with '/', unlike 'chat'"),
        ('[[http_client]]\ntimeout = 0', "line 2: timeout must be a positive number of seconds"),
        ("[[task_queue]]\nmax_concurrent_tasks = 0", "line 2: max_concurrent_tasks must be 1 or more"),
        ('wsgi = "a"\nport = = 3', "line 2: this is no TOML"),
    ],
)  # fmt: skip
def test_an_error_names_the_key_the_line_and_the_nearest_right_key(load: Any, text: str, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(text)
    assert str(caught.value).startswith("puff.toml, line ")
    assert told in str(caught.value)


def test_a_file_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert project.find() == Project()
    monkeypatch.setenv("PUFF_CONFIG", "other.toml")
    with pytest.raises(ConfigError, match=r"cannot read other\.toml: .*No such file"):
        project.find()
    (tmp_path / "other.toml").write_bytes(b"a = '\xff'")
    with pytest.raises(ConfigError, match=r"cannot read other\.toml: .*utf-8"):
        project.find()


def test_the_line_of_a_key_is_that_where_its_statement_begins() -> None:
    text = '# x\na = [\n 1,\n]\n\nb = """\nc = 3\n"""\n[t]\nd = {e = 1}\n[[u]]\n[[u]]\n"f.g" = 1\n'
    lines = {
        ("a",): 2,
        ("a", 0): 2,
        ("b",): 6,
        ("t",): 9,
        ("t", "d", "e"): 10,
        ("u", 0): 11,
        ("u", 1): 12,
        ("u", 1, "f.g"): 13,
        ("c",): None,
    }
    assert {location: project.line_of(text, location) for location in lines} == lines


def test_the_environment_wins_over_the_file(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found = load(
        """
        embedded = false
        data_dir = "data"
        slow_checkout_ms = 5
        [postgres_pool]
        max_size = 7
        timeout = 3
        [[postgres]]
        url = "postgres://file/default"
        pool_size = 4
        [[postgres]]
        name = "Reports"
        url = "postgres://file/reports"
        [[redis]]
        name = "other"
        url = "redis://file"
        max_idle = 5
        [[redis]]
        name = "off"
        enable = false
        url = "redis://off"
        """
    )
    monkeypatch.setenv("PUFF_REPORTS_POSTGRES_URL", "postgres://environment/reports")
    monkeypatch.setenv("PUFF_POSTGRES_POOL_TIMEOUT", "2")
    monkeypatch.setenv("PUFF_DEFAULT_POSTGRES_POOL_MAX_SIZE", "5")
    monkeypatch.setenv("PUFF_OTHER_REDIS_POOL_TIMEOUT", "1")
    project.use(found)
    try:
        current = config.current()
    finally:
        project.use(None)
    assert config.current().data_dir == Path(".puff"), "what was used is no longer"
    assert (current.data_dir, current.slow_checkout_ms) == (Path("data"), 5)
    assert current.postgres_url() == "postgres://file/default"
    assert current.postgres_url("reports") == "postgres://environment/reports"
    assert current.redis_url("other") == "redis://file"
    assert current.redis_url("off") == config.DEFAULT_REDIS_URL
    assert current.postgres_pool == PoolOptions(max_size=7, timeout=2)
    assert current.postgres_pool_options() == PoolOptions(max_size=5, timeout=2)
    assert current.postgres_pool_options("reports") == PoolOptions(max_size=7, timeout=2)
    assert current.redis_pool_options("OTHER") == PoolOptions(max_size=100, max_idle=5, timeout=1)


def test_a_wrong_pool_of_one_service_names_the_variable() -> None:
    with pytest.raises(ConfigError, match=r"PUFF_AUDIT_POSTGRES_POOL_MAX_SICE: .*did you mean 'max_size'"):
        Config.from_env({"PUFF_AUDIT_POSTGRES_POOL_MAX_SICE": "3"})
    with pytest.raises(ConfigError, match="PostgreSQL 'audit': pool sizes"):
        Config.from_env({"PUFF_AUDIT_POSTGRES_POOL_MAX_SIZE": "0"})


def test_pubsub_and_tasks_use_the_redis_of_their_name_or_the_default_one() -> None:
    found = Config.from_env(
        {
            "PUFF_DEFAULT_REDIS_URL": "redis://default",
            "PUFF_JOBS_REDIS_URL": "redis://jobs",
            "PUFF_NEWS_PUBSUB_URL": "redis://news",
            "PUFF_MAIL_TASK_QUEUE_URL": "redis://mail",
        }
    )
    assert [found.pubsub_url(name) for name in ("news", "jobs", "mail", "default")] == [
        *("redis://news", "redis://jobs", "redis://default", "redis://default")
    ]
    assert [found.task_queue_url(name) for name in ("Mail", "jobs", "news")] == [
        *("redis://mail", "redis://jobs", "redis://default")
    ]


def test_the_server_is_told_by_the_file_the_environment_and_the_command_line_in_this_order(load: Any) -> None:
    found = load('bind = "0.0.0.0:1000"\nmax_greenlets = 10\nbacklog = 11\n')

    def told(given: dict[str, Any], **environ: str) -> tuple[Any, ...]:
        options = serving.server_options(found, given, environ=environ, otherwise={"backlog": 1, "port": 2})
        return options.host, options.port, options.uds, options.max_greenlets, options.backlog

    assert told({}) == ("0.0.0.0", 1000, None, 10, 11)
    assert told({}, PUFF_PORT="3", PUFF_MAX_GREENLETS="4") == ("0.0.0.0", 3, None, 4, 11)
    assert told({"max_greenlets": 5}, PUFF_BIND="[::1]:6", PUFF_MAX_GREENLETS="4") == ("::1", 6, None, 5, 11)
    assert told({"bind": "unix:/tmp/s"}) == ("0.0.0.0", 1000, "/tmp/s", 10, 11)
    assert told({"bind": "7"}, PUFF_UDS="/tmp/s") == ("0.0.0.0", 7, None, 10, 11)
    assert told({"verbosity": 1, "nothing_of_ours": 2}) == told({})


@pytest.mark.parametrize(
    ("text", "given", "environ", "message"),
    [
        ("a = 1\n", {}, {}, "unknown key 'a'"),
        ("\nport = 70000\n", {}, {}, "puff.toml, line 2: port must be between 0 and 65535"),
        ("", {}, {"PUFF_PORT": "tcp://10.0.0.1:80"}, "PUFF_PORT takes a whole number, got 'tcp://10.0.0.1:80'"),
        ("", {}, {"PUFF_MAX_GREENLETS": "0"}, "PUFF_MAX_GREENLETS: max_greenlets must be at least 1"),
        ("port = 70000\n", {"max_greenlets": 0, "port": 1}, {}, "--max-greenlets: max_greenlets must be"),
        ("", {"bind": "a:b:c"}, {}, "--bind: bind takes HOST:PORT, PORT or unix:PATH, got 'a:b:c'"),
        ('bind = "here"', {}, {}, "puff.toml, line 1: bind takes HOST:PORT"),
        ("", {}, {"PUFF_ACCESS_LOG": "maybe"}, "PUFF_ACCESS_LOG takes true or false, got 'maybe'"),
    ],
)
def test_a_wrong_option_of_the_server_names_where_it_was_said(
    load: Any, text: str, given: dict[str, Any], environ: dict[str, str], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        serving.server_options(load(text), given, environ=environ)
    assert message in str(caught.value)


def test_settings_say_the_same_as_the_file_and_win(load: Any) -> None:
    found = load('max_greenlets = 1\nbacklog = 0\n[[postgres]]\nname = "a"\n').overlaid(
        {"max_greenlets": 2, "asgi_paths": ("/a", "/b"), "postgres": [{"name": "b", "pool_size": 3}]},
        Source("settings.PUFF"),
    )
    assert found.server["max_greenlets"] == 2
    assert found.program.asgi_paths == ("/a", "/b")
    assert found.config.postgres_pools == {"b": {"max_size": 3}}
    with pytest.raises(ConfigError, match=r"^puff\.toml, line 2: backlog must be at least 1"):
        serving.server_options(found, {}, environ={})
    for wrong, told in (
        ({"wsgy": "a"}, r"settings\.PUFF: unknown key 'wsgy'; did you mean 'wsgi'"),
        ({"redis": [{}, {"nam": 1}]}, r"settings\.PUFF\['redis'\]\[1\]: unknown key 'nam'; did you mean 'name'"),
    ):
        with pytest.raises(ConfigError, match=told):
            found.overlaid(wrong, Source("settings.PUFF"))


def test_the_example_has_every_key_and_is_right_with_and_without_its_comments(load: Any) -> None:
    text = example()
    said = load(text)
    assert serving.server_options(said, {}, environ={}) == serving.server_options(Project(), {}, environ={})
    assert said.config == Config(
        http_clients={"default": HttpClientOptions()}, task_queues={"default": config.TaskQueueOptions()}
    ), "what it says is what holds without it"
    everything = load(re.sub(r"^# (?=\w+ = |\[+\w+\]+$)", "", text, flags=re.M))
    assert set(everything.values) == set(project.allowed_keys())
    for key in project.allowed_keys().values():
        table = key.kind.table or key.kind.tables
        if table is not None:
            value = everything.values[key.name]
            assert set(value if key.kind.table else value[0]) == set(schema.keys(table)), key.name
        assert key.help, f"{key.name} is not explained"


@dataclass(frozen=True)
class Packing:
    """How to compress.

    Args:
        level: how much.
    """

    level: int = 4


@dataclass(frozen=True)
class Origins:
    """As the server's filter has it."""

    allow_origins: tuple[str, ...] = ()
    allow_origin_regex: str = ""
    allow_methods: tuple[str, ...] = ("GET",)
    allow_headers: tuple[str, ...] = ()
    allow_credentials: bool = False
    max_age: int = 600

    def __post_init__(self) -> None:
        if not self.allow_origins and not self.allow_origin_regex:
            raise ValueError("CORS needs allow_origins")


@dataclass(frozen=True)
class MoreOptions(ServerOptions):
    """What the server may have tomorrow.

    Args:
        workers_more: how many *more* ``processes``,
            in two lines.
        secret: not to be shown.
        mode: of two.
        labels: of each request.
        compression: see there.
        cors: see there.
        mounts: folders.
    """

    workers_more: int = 1
    secret: str | None = field(default=None, repr=False)
    mode: Literal["slow", "fast"] = "slow"
    labels: Mapping[str, str] = field(default_factory=dict)
    compression: Packing | None = None
    cors: Origins | None = None
    mounts: tuple[Packing, ...] = ()
    callback: Callable[[], object] | None = None


@pytest.fixture
def more_options(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("puff_patch.server.options.ServerOptions", MoreOptions)
    project.server_keys.cache_clear()
    yield
    project.server_keys.cache_clear()


@pytest.mark.usefixtures("more_options")
def test_a_field_of_the_server_is_a_key_a_variable_and_an_option_without_a_word_more(load: Any) -> None:
    found = load(
        """
        workers_more = 2
        labels = {a = "1"}
        compression_middleware = true
        [cors]
        allowed_origins = "http://a"
        max_age_secs = 5
        [[mounts]]
        level = 1
        """
    )
    parser = ArgumentParser(formatter_class=serving.HelpFormatter)
    serving.add_server_options(parser, found)
    shown = " ".join(parser.format_help().split())
    assert "how many *more* processes, in two lines. [env: PUFF_WORKERS_MORE=] [default: 2]" in shown
    assert "secret" not in shown
    assert "callback" not in shown
    given = vars(parser.parse_args(["--mode", "fast"]))
    options: Any = serving.server_options(found, given, environ={"PUFF_SECRET": "hush", "PUFF_LABELS": "b=2, c=3"})
    assert (options.workers_more, options.mode, options.secret) == (2, "fast", "hush")
    assert options.labels == {"b": "2", "c": "3"}
    assert options.mounts == (Packing(1),)
    assert options.compression == Packing()
    assert options.cors == Origins(allow_origins=("http://a",), max_age=5)
    packed: Any = serving.server_options(load("[compression]\nlevel = 9\n"), {}, environ={})
    assert packed.compression == Packing(9)
    with pytest.raises(ConfigError, match=r"^puff\.toml, line 2: CORS needs allow_origins"):
        serving.server_options(load("\n[cors]\nallow_credentials = true\n"), {}, environ={})
    with pytest.raises(ConfigError, match=r"PUFF_SECRET takes|line 1: mode takes \"slow\" or \"fast\", got 'x'"):
        load("mode = 'x'")
    with pytest.raises(SystemExit):
        parser.parse_args(["--mode", "other"])
    everything = load(re.sub(r"^# (?=\w+ = |\[+\w+\]+$)", "", example(), flags=re.M))
    assert set(everything.values) == set(project.allowed_keys())
    assert serving.server_options(load(example()), {}, environ={}) == MoreOptions()


def test_cors_in_the_words_of_the_server() -> None:
    def told(**said: Any) -> dict[str, Any]:
        return serving._cors(schema.build(project.Cors, said))

    assert told() == {}
    assert told(allowed_origins=["http://a"], max_age_secs=3, allowed_headers="*") == {
        "allow_origins": ("http://a",),
        "max_age": 3,
        "allow_headers": ("*",),
    }
    assert told(base_config="Permissive", allow_methods=["GET"]) == {
        "allow_origins": ("*",),
        "allow_headers": ("*",),
        "allow_methods": ("GET",),
    }
    assert told(base_config="VeryPermissive")["allow_credentials"] is True


def test_a_password_is_not_shown() -> None:
    assert serving.without_password("redis://me:hush@host:1/0") == "redis://me:***@host:1/0"
    assert serving.without_password("redis://host") == "redis://host"
