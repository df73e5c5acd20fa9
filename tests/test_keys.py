"""Keys: how they are written, where they come from, what is taken for one."""

import hmac
import os
from pathlib import Path

import pytest

from agent_memory import config, keys
from agent_memory.errors import ConfigError
from agent_memory.keys import Caller, Keys

ONE, TWO = "first-key-of-some-length", "second+key/of=some-length"
THREE, FOUR = "third-key-of-some-length", "fourth-key-of-some-length"


def private(path: Path, text: str, mode: int = 0o600) -> Path:
    path.write_text(text)
    path.chmod(mode)
    return path


@pytest.mark.requirement("B-09", "S-07")
@pytest.mark.parametrize("text", [f"{ONE},{TWO}", f" {ONE} ,\n{TWO}\n", f"{ONE}\r\n\r\n{TWO},"])
def test_several_keys(text: str) -> None:
    found = keys.parse(text)
    assert len(found.known) == 2 and found.tenants == (None,)
    assert found.caller(ONE) == found.caller(TWO) == Caller() and Caller().is_owner
    for other in ("", ONE[:-1], ONE + "x", ONE.upper(), f"{ONE},{TWO}", "\ud800", "ä" * 20):
        assert found.caller(other) is None


@pytest.mark.requirement("S-08", "S-22")
def test_keys_of_tenants() -> None:
    found = keys.parse(f"zoo:{ONE}, {TWO}\nacme: {THREE},acme:{FOUR},acme:{FOUR}")
    assert found.tenants == (None, "acme", "zoo")
    assert [found.caller(key) for key in (ONE, TWO, THREE, FOUR)] == [
        *(Caller("zoo"), Caller(), Caller("acme"), Caller("acme")),
    ]
    assert not Caller("acme").is_owner and not Caller(trusted=False).is_owner
    assert found.caller(f"zoo:{ONE}") is None


@pytest.mark.requirement("S-07")
@pytest.mark.parametrize("key", [ONE, TWO, "neither"])
def test_each_key_is_compared_whichever_is_right(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[bytes] = []

    def compare(brought: bytes, known: bytes) -> bool:
        compared.append(known)
        return brought == known

    monkeypatch.setattr(hmac, "compare_digest", compare)
    found = keys.parse(f"{ONE},{TWO}")
    assert (found.caller(key) is not None) == (key != "neither")
    assert compared == [digest for digest, _ in found.known]


def test_none_is_no_key() -> None:
    assert not keys.parse("none") and not Keys().caller("none") and not Keys().caller("")


@pytest.mark.parametrize(
    "text",
    [
        *("", " ", ",", "short", f"{ONE},short", "x" * 201, "with a space in it"),
        *(f"a:{ONE}:", f"Acme:{ONE}", f"ac me:{ONE}", f"a/b:{ONE}", f":{ONE}", "acme:short"),
        *(f"{'a' * 33}:{ONE}", f"one:{ONE},two:{ONE}", f"one:{ONE},{ONE}"),
    ],
)
def test_what_is_no_key(text: str) -> None:
    with pytest.raises(ValueError, match="^$"):
        keys.parse(text)


@pytest.mark.requirement("S-07")
def test_a_key_is_neither_kept_nor_repeated(tmp_path: Path) -> None:
    assert ONE not in repr(keys.parse(ONE)) and ONE not in repr(keys.parse(ONE).known)
    file = private(tmp_path / "c.toml", f"api_keys = '{ONE},bad one'")
    with pytest.raises(ConfigError) as caught:
        config.load({}, {}, file)
    assert str(caught.value) == (
        f"{file}, key 'api_keys': what is there cannot be used. Allowed: {keys.ALLOWED}."
    )


@pytest.mark.requirement("S-07")
def test_keys_come_from_a_file_or_the_environment(tmp_path: Path) -> None:
    named = private(tmp_path / "keys", f"{ONE}\n{TWO}\n")
    setting = next(setting for setting in config.SETTINGS if setting.name == "api_keys")
    assert setting.flag == "--api-keys-file"
    assert setting.read_flag(str(named)) == keys.parse(f"{ONE},{TWO}")
    assert config.load({}, {"AGENT_MEMORY_API_KEYS": ONE}, None).api_keys == keys.parse(ONE)
    in_toml = private(tmp_path / "c.toml", f"api_keys = '{TWO}'")
    assert config.load({}, {}, in_toml).api_keys == keys.parse(TWO)
    assert not config.load({}, {"AGENT_MEMORY_API_KEYS": "none"}, in_toml).api_keys


@pytest.mark.requirement("S-07")
@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o622])
def test_a_file_that_others_can_open_is_refused(tmp_path: Path, mode: int) -> None:
    named = private(tmp_path / "keys", ONE, mode)
    with pytest.raises(ConfigError, match=f"chmod 600 {named}"):
        keys.private_text(named)
    in_toml = private(tmp_path / "c.toml", f"api_keys = '{ONE}'", mode)
    with pytest.raises(ConfigError, match=f"chmod 600 {in_toml}"):
        config.load({}, {}, in_toml)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_file_of_somebody_else_is_refused(tmp_path: Path) -> None:
    named = private(tmp_path / "keys", ONE)
    os.chown(named, 65534, 65534)
    with pytest.raises(ConfigError, match="belongs to another user"):
        keys.private_text(named)


def test_a_file_that_is_not_there_or_holds_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Write a key on each of its lines"):
        keys.private_text(tmp_path / "absent")
    with pytest.raises(ConfigError, match="is no key"):
        keys.of_client({}, private(tmp_path / "keys", "\n"))


def test_the_key_of_a_client(tmp_path: Path) -> None:
    named = private(tmp_path / "keys", f"{TWO}\n{ONE}\n")
    assert keys.of_client({}, None) == ""
    assert keys.of_client({keys.CLIENT_VARIABLE: ONE}, None) == ONE
    assert keys.of_client({keys.CLIENT_VARIABLE: ONE}, named) == TWO
    assert keys.of_client({keys.CLIENT_VARIABLE: f"acme:{ONE}"}, None) == ONE
    with pytest.raises(ConfigError) as caught:
        keys.of_client({keys.CLIENT_VARIABLE: "a secret"}, None)
    assert "a secret" not in str(caught.value)
