"""Where a setting comes from, and what is said of one that cannot be used."""

import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

import pytest

from agent_memory import keys
from agent_memory.config import SETTINGS, Config, Setting, load
from agent_memory.errors import ConfigError
from agent_memory.keys import Keys
from agent_memory.model_source import ModelSource

NO_FLAGS: Mapping[str, object] = {}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of its own, so that nobody's settings file counts."""
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return path


def test_defaults(home: Path) -> None:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert load({}, {}, None) == Config(
        host="127.0.0.1",
        port=8000,
        uds=None,
        api_keys=Keys(),
        models=(ModelSource("builtin", "builtin"),),
        model_chosen=False,
        model_idle_timeout=None,
        state_dir=home / ".agent_memory",
        kv_bits=8,
        kv_group_size=64,
        step_tokens=256,
        pool_bytes=min(memory // 8, 8 << 30),
        disk_bytes=None,
        min_free_bytes=None,
        max_age_days=90,
        daily_write_bytes=50 << 30,
        memory_bytes=None,
        max_requests=256,
        max_connections=512,
        agent_requests=None,
        agent_requests_per_minute=None,
        send_timeout=30.0,
        drain_timeout=25.0,
        log_format="console",
        preload=True,
    )


def test_every_field_is_a_setting() -> None:
    made = {field.name for field in fields(Config)} - {"model_chosen", "models"}
    assert {setting.name for setting in SETTINGS} == made | {"model", "context_length"}


def test_flag_over_environment_over_file_over_default(home: Path) -> None:
    write(home / ".agent_memory/config.toml", "port = 1\nkv_bits = 4\nstep_tokens = 3\n")
    environ = {"AGENT_MEMORY_PORT": "4", "AGENT_MEMORY_KV_BITS": "none"}
    got = load({"port": 6}, environ, None)
    assert (got.port, got.kv_bits, got.step_tokens, got.kv_group_size) == (6, None, 3, 64)


def test_an_empty_variable_counts_as_not_set() -> None:
    assert load({}, {"AGENT_MEMORY_PORT": ""}, None).port == 8000


@pytest.mark.parametrize(
    ("flags", "environ", "file"),
    [
        ({"model": [ModelSource("builtin", "builtin")]}, {}, ""),
        ({}, {"AGENT_MEMORY_MODEL": "builtin"}, ""),
        ({}, {}, "model = 'builtin'"),
    ],
)
def test_naming_the_builtin_model_is_choosing_it(
    home: Path, flags: dict[str, object], environ: dict[str, str], file: str
) -> None:
    assert load(flags, environ, write(home / "c.toml", file)).model_chosen


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("pool_bytes = '512M'", "pool_bytes", 512 << 20),
        ("pool_bytes = '2g'", "pool_bytes", 2 << 30),
        ("pool_bytes = 1048576", "pool_bytes", 1 << 20),
        ("memory_bytes = 'auto'", "memory_bytes", None),
        ("memory_bytes = '64M'", "memory_bytes", 64 << 20),
        ("drain_timeout = 0", "drain_timeout", 0.0),
        ("drain_timeout = 2.5", "drain_timeout", 2.5),
        ("kv_bits = 'none'", "kv_bits", None),
        ("preload = false", "preload", False),
        ("host = '::1'", "host", "::1"),
        ("host = 'localhost'", "host", "localhost"),
        ("state_dir = '/x'", "state_dir", Path("/x")),
    ],
)
def test_values_that_are_allowed(home: Path, line: str, name: str, value: object) -> None:
    assert getattr(load({}, {}, write(home / "c.toml", line)), name) == value


def test_a_relative_state_directory_is_made_absolute() -> None:
    config = load({}, {"AGENT_MEMORY_STATE_DIR": "memory"}, None)
    assert config.state_dir == Path.cwd() / "memory"


@pytest.mark.parametrize(
    "line",
    [
        "port = 65536",
        "port = -1",
        "port = '80'",
        "port = true",
        "port = 80.0",
        "host = ''",
        "model = 3",
        "model = ' '",
        'model = "a\\nb"',
        "kv_bits = 3",
        "kv_group_size = 16",
        "step_tokens = 0",
        "step_tokens = 8193",
        "pool_bytes = '1K'",
        "pool_bytes = '2T'",
        "pool_bytes = '1.5G'",
        "memory_bytes = '63M'",
        "memory_bytes = '17T'",
        "max_requests = 0",
        "send_timeout = 0",
        "drain_timeout = 3600.5",
        "drain_timeout = -1",
        "drain_timeout = nan",
        "log_format = 'xml'",
        "preload = 'true'",
        "state_dir = ['x']",
        "state_dir = '~nobody-of-this-name/x'",
    ],
)
def test_a_bad_value_in_the_file_is_placed(home: Path, line: str) -> None:
    key = line.split(" =")[0]
    file = write(home / "c.toml", line)
    allowed = next(setting.allowed for setting in SETTINGS if setting.name == key)
    with pytest.raises(ConfigError) as caught:
        load({}, {}, file)
    assert str(caught.value).startswith(f"{file}, key '{key}': ")
    assert str(caught.value).endswith(f"cannot be used. Allowed: {allowed}.")


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
@pytest.mark.parametrize("text", [" ", "x", "-1", "9" * 5000, "1e400", "yes", "8 x"])
def test_a_bad_variable_is_placed(setting: Setting, text: str) -> None:
    if setting.name in ("host", "model", "state_dir", "uds") and text != " ":
        return  # these are any text
    told = "what is there" if setting.secret else f"'{text}'"
    with pytest.raises(ConfigError, match=f"^{setting.variable}: {told} cannot be used. Allow"):
        load({}, {setting.variable: text}, None)


@pytest.mark.requirement("S-11")
def test_each_tenant_needs_places_of_its_own(home: Path) -> None:
    shared = {"api_keys": keys.parse("a-key-of-the-owner,acme:a-key-of-acmes-own")}
    with pytest.raises(ConfigError, match="each of the 2 that share.* Set it to 4 or more"):
        load({**shared, "max_requests": 3}, {}, None)
    assert load({**shared, "max_requests": 4}, {}, None).api_keys.tenants == (None, "acme")
    assert load({"max_requests": 1}, {}, None).max_requests == 1


@pytest.mark.parametrize("text", ["1_0", "٣", "+5", " 5"])
def test_whole_numbers_are_plain_digits(text: str) -> None:
    with pytest.raises(ConfigError):
        load({}, {"AGENT_MEMORY_PORT": text}, None)


def test_an_unknown_key_is_refused_with_the_nearest_name(home: Path) -> None:
    file = write(home / "c.toml", "kv_bit = 4")
    with pytest.raises(ConfigError, match="key 'kv_bit': there is no such setting. .*'kv_bits'"):
        load({}, {}, file)
    write(file, "[server]\nport = 1")
    with pytest.raises(ConfigError, match="key 'server': .* Known are: host, port, "):
        load({}, {}, file)


@pytest.mark.parametrize("content", [b"port 8000", b"\xff", b"a = 1\na = 2"])
def test_a_file_that_is_not_toml_is_refused(home: Path, content: bytes) -> None:
    file = home / "c.toml"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match="is not TOML"):
        load({}, {}, file)


def test_a_named_file_must_be_there_and_be_a_file(home: Path) -> None:
    with pytest.raises(ConfigError, match="--config: there is no file"):
        load({}, {}, home / "absent.toml")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load({}, {}, home)


@pytest.mark.requirement("S-05")
@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.0.7", "::", "example.org", "127.0.0.1.evil"])
def test_a_host_that_others_reach_is_refused_with_its_place(host: str) -> None:
    with pytest.raises(ConfigError, match=f"^--host: '{host}' would let other machines in"):
        load({"host": host}, {}, None)
    with pytest.raises(ConfigError, match="^AGENT_MEMORY_HOST: "):
        load({}, {"AGENT_MEMORY_HOST": host}, None)


@pytest.mark.requirement("S-05")
def test_with_keys_or_a_unix_socket_any_host_will_do() -> None:
    keys = {"AGENT_MEMORY_API_KEYS": "a-key-that-is-long-enough"}
    assert load({"host": "0.0.0.0"}, keys, None).host == "0.0.0.0"
    assert load({"host": "0.0.0.0", "uds": Path("/x")}, {}, None).uds == Path("/x")


def test_a_home_that_nobody_has_is_named() -> None:
    with pytest.raises(ConfigError, match="--config: ~nobody.here/c"):
        load({}, {}, Path("~nobody.here/c"))
