"""Settings: one table, and one frozen Config made from it at start.

Knows where a value may come from, what it may be, and how to name the place of a bad one.  Knows
nothing of what a setting does.  Any thread.

    flag --kv-bits  >  variable AGENT_MEMORY_KV_BITS  >  file key kv_bits  >  default

The flag --model may be repeated; in the file the table [models] stands for all of them.
"""

import difflib
import ipaddress
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent_memory import keys, model_source
from agent_memory.errors import ConfigError
from agent_memory.keys import Keys
from agent_memory.model_source import MAX_CONTEXT, MODELS, ModelSource
from agent_memory.values import (
    UNITS,
    absolute,
    one_of,
    pool_bytes,
    seconds,
    size,
    unless,
    whole,
    words,
)

CONFIG_FILE = Path("~/.agent_memory/config.toml")


@dataclass(frozen=True, slots=True)
class Config:
    """What the server runs with.  Timeouts in seconds."""

    host: str
    port: int  # 0: the system picks a free one
    uds: Path | None  # a Unix socket instead of both
    api_keys: Keys
    models: tuple[ModelSource, ...]  # at least one; the first is the default
    model_chosen: bool  # somebody named a model; else the built-in one serves
    model_idle_timeout: float | None  # None: what is loaded stays until others need its room
    state_dir: Path
    kv_bits: int | None  # None: K and V stay in the model's type
    kv_group_size: int
    step_tokens: int
    pool_bytes: int
    disk_bytes: int | None  # None: by the size of the disk
    min_free_bytes: int | None  # None: by the size of the disk
    max_age_days: int | None  # None: no limit
    daily_write_bytes: int | None  # None: no limit
    memory_bytes: int | None  # None: what the machine can give
    max_requests: int
    max_connections: int
    agent_requests: int | None  # None: no limit but max_requests
    agent_requests_per_minute: int | None  # None: no limit
    send_timeout: float
    drain_timeout: float
    log_format: str
    preload: bool


@dataclass(frozen=True, slots=True)
class Setting:
    """One row of the table.  `parse` makes the value from text, or raises ValueError.

    What is `secret` is never repeated, and its flag names a private file that holds it.
    """

    name: str
    default: str
    parse: Callable[[str], object]
    toml_types: tuple[type, ...]
    allowed: str
    text: str
    secret: bool = False
    repeats: bool = False

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-") + ("-file" if self.secret else "")

    @property
    def variable(self) -> str:
        return "AGENT_MEMORY_" + self.name.upper()

    def read(self, text: str, place: str) -> object:
        try:
            return self.parse(text)
        except ValueError as error:
            raise self.refusal(text, place) from error

    def read_flag(self, text: str) -> object:
        """Raises ValueError; of a secret ConfigError."""
        if self.secret:
            return self.read(keys.private_text(absolute(text)), f"{self.flag} {text}")
        return self.parse(text)

    def read_toml(self, value: object, place: str) -> object:
        if type(value) not in self.toml_types:  # not isinstance: true is no number here
            raise self.refusal(value, place)
        return self.read(str(value).lower() if isinstance(value, bool) else str(value), place)

    def refusal(self, value: object, place: str) -> ConfigError:
        told = "what is there" if self.secret else repr(value)
        return ConfigError(f"{place}: {told} cannot be used. Allowed: {self.allowed}.")


SETTINGS = (
    Setting(
        "host",
        "127.0.0.1",
        words,
        (str,),
        "127.0.0.1, ::1 or localhost; with api_keys any other",
        "Address to listen on.",
    ),
    Setting(
        "port",
        "8000",
        whole(0, 65535),
        (int,),
        "0 to 65535; 0 takes a free one",
        "Port to listen on.",
    ),
    Setting(
        "uds",
        "none",
        unless("none", absolute),
        (str,),
        "a path, or none",
        "Unix socket to listen on, which only you can open, instead of host and port.",
    ),
    Setting(
        "api_keys",
        "none",
        keys.parse,
        (str,),
        keys.ALLOWED,
        "Every request must bring one of them; the flag names a file with a key on each line. "
        "Those of a tenant open its own memory only.",
        secret=True,
    ),
    Setting(
        "model",
        "builtin",
        model_source.parse,
        (str,),
        "builtin, a directory, or a Hugging Face name; NAME= before it gives it another name",
        "Model to serve; the flag may be repeated, the first is the default.",
        repeats=True,
    ),
    Setting(
        "context_length",
        "auto",
        unless("auto", whole(2, MAX_CONTEXT)),
        (int, str),
        f"auto, or 2 to {MAX_CONTEXT} tokens",
        "Context of the default model; auto: what it was made for.",
    ),
    Setting(
        "model_idle_timeout",
        "none",
        unless("none", seconds(1, 604_800)),
        (int, float, str),
        "1 to 604800 seconds, or none",
        "A model that nobody used for so long is unloaded, unless it is pinned.",
    ),
    Setting(
        "state_dir",
        "~/.agent_memory",
        absolute,
        (str,),
        "a directory",
        "Where memory is kept on disk.",
    ),
    Setting(
        "kv_bits",
        "8",
        one_of({"4": 4, "8": 8, "none": None}),
        (int, str),
        "4, 8 or none",
        "Bits per number of K and V; none keeps the model's type.",
    ),
    Setting(
        "kv_group_size",
        "64",
        one_of({"32": 32, "64": 64, "128": 128}),
        (int,),
        "32, 64 or 128",
        "How many numbers of K or V share a scale.",
    ),
    Setting(
        "step_tokens",
        "256",
        whole(1, 8192),
        (int,),
        "1 to 8192",
        "Tokens computed together in one step.",
    ),
    Setting(
        "pool_bytes",
        "auto",
        pool_bytes,
        (int, str),
        "auto, or 1M to 1T in bytes or with K, M, G, T",
        "Memory for blocks that no running request uses, an eighth of it, at most 256M, to read "
        "blocks into; auto: an eighth of the machine's, at most 8G.",
    ),
    Setting(
        "disk_bytes",
        "auto",
        unless("auto", size(UNITS["M"], 1024 * UNITS["T"])),
        (int, str),
        "auto, or 1M to 1024T in bytes or with K, M, G, T",
        "Most that memory may take on disk; auto: a tenth of the disk, at most 50G.",
    ),
    Setting(
        "min_free_bytes",
        "auto",
        unless("auto", size(0, 1024 * UNITS["T"])),
        (int, str),
        "auto, or 0 to 1024T in bytes or with K, M, G, T",
        "What stays free on the disk; auto: a twentieth of it, at most 10G.",
    ),
    Setting(
        "max_age_days",
        "90",
        unless("none", whole(1, 3650)),
        (int, str),
        "1 to 3650, or none",
        "What is not used on so many days is forgotten; days without the server do not count.",
    ),
    Setting(
        "daily_write_bytes",
        "50G",
        unless("none", size(UNITS["M"], 1024 * UNITS["T"])),
        (int, str),
        "1M to 1024T in bytes or with K, M, G, T, or none",
        "Most that is written on one day, to spare the SSD; more is kept in RAM only.",
    ),
    Setting(
        "memory_bytes",
        "auto",
        unless("auto", size(64 * UNITS["M"], 16 * UNITS["T"])),
        (int, str),
        "auto, or 64M to 16T in bytes or with K, M, G, T",
        "Memory for everything together; auto: what Metal recommends, else three quarters.",
    ),
    Setting(
        "max_requests",
        "256",
        whole(1, 10_000),
        (int,),
        "1 to 10000",
        "Requests that may wait or run at once; more are told to come back.",
    ),
    Setting(
        "max_connections",
        "512",
        whole(8, 100_000),
        (int,),
        "8 to 100000",
        "Connections that may be open at once; for more the one that waits longest is closed.",
    ),
    Setting(
        "agent_requests",
        "none",
        unless("none", whole(1, 10_000)),
        (int, str),
        "1 to 10000, or none",
        "Requests of one agent that may wait or run at once; for more it hears 429.",
    ),
    Setting(
        "agent_requests_per_minute",
        "none",
        unless("none", whole(1, 100_000)),
        (int, str),
        "1 to 100000, or none",
        "How often one agent may ask; for more it hears 429.",
    ),
    Setting(
        "send_timeout",
        "30",
        seconds(0.1),
        (int, float),
        "0.1 to 3600 seconds",
        "How long a client may read nothing of what it is sent before it is cut off.",
    ),
    Setting(
        "drain_timeout",
        "25",
        seconds(0),
        (int, float),
        "0 to 3600 seconds",
        "How long running requests may go on after a stop signal.",
    ),
    Setting(
        "log_format",
        "console",
        one_of({"console": "console", "json": "json"}),
        (str,),
        "console or json",
        "How log lines on stderr look.",
    ),
    Setting(
        "preload",
        "true",
        one_of({"true": True, "false": False}),
        (bool,),
        "true or false",
        "On a Linux CPU, start again with OpenBLAS where it is installed.",
    ),
)


def load(flags: Mapping[str, object], environ: Mapping[str, str], path: Path | None) -> Config:
    """`flags` holds the values of the flags that were given; `path` is --config's.

    An empty variable counts as not set.  Raises ConfigError.
    """
    try:
        file = (path or CONFIG_FILE).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"--config: {path or CONFIG_FILE}: nobody has that home.") from error
    table = _read_file(file, must_exist=path is not None)
    values: dict[str, Any] = {}
    places: dict[str, str] = {}
    for setting in SETTINGS:
        name, place = setting.name, f"{file}, key '{setting.name}'"
        if name in flags:
            values[name], places[name] = flags[name], setting.flag
        elif text := environ.get(setting.variable):
            values[name], places[name] = setting.read(text, setting.variable), setting.variable
        elif name in table:
            values[name], places[name] = setting.read_toml(table[name], place), place
        else:
            values[name] = setting.parse(setting.default)
    if not values["api_keys"] and values["uds"] is None:
        _refuse_open_host(values["host"], places.get("host", "default"))
    _refuse_too_few(values["max_requests"], len(values["api_keys"].tenants))
    chosen = values.pop("model")
    if MODELS in table and ("model" in table or "model" not in places):
        chosen, places["model"] = model_source.of_file(table, file), f"{file}, [{MODELS}]"
    models = model_source.several(chosen, places.get("model", ""), values.pop("context_length"))
    return Config(**values, models=models, model_chosen="model" in places)


def _read_file(file: Path, *, must_exist: bool) -> dict[str, object]:
    try:
        table = tomllib.loads(file.read_text("utf-8"))
    except FileNotFoundError as error:
        if not must_exist:
            return {}
        raise ConfigError(
            f"--config: there is no file {file}. Write it or name another."
        ) from error
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}. Mend or move it.") from error
    except ValueError as error:  # not TOML, or not even UTF-8
        raise ConfigError(f"{file} is not TOML: {error}. Correct it or move it away.") from error
    known = [setting.name for setting in SETTINGS]
    for key in table.keys() - {*known, MODELS}:
        near = difflib.get_close_matches(key, known, 1)
        hint = f"Did you mean '{near[0]}'?" if near else f"Known are: {', '.join(known)}."
        raise ConfigError(f"{file}, key '{key}': there is no such setting. {hint}")
    if any(setting.secret for setting in SETTINGS if setting.name in table):
        keys.check_private(file, file.stat())
    return table


def is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _refuse_too_few(max_requests: int, num_tenants: int) -> None:
    if num_tenants > 1 and max_requests < 2 * num_tenants:
        raise ConfigError(
            f"max_requests is {max_requests}, and each of the {num_tenants} that share this "
            f"server, the owner counted, needs two places. Set it to {2 * num_tenants} or more."
        )


def _refuse_open_host(host: str, place: str) -> None:
    if not is_loopback(host):
        raise ConfigError(
            f"{place}: {host!r} would let other machines in, and without keys this server cannot "
            "tell them apart. Name a file of keys with --api-keys-file, or use 127.0.0.1 and a "
            "tunnel such as ssh -L from elsewhere."
        )
