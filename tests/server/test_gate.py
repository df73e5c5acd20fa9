"""Who gets in, and how bodies are read."""

import asyncio

import pytest
from starlette.datastructures import Headers
from starlette.types import Message, Receive

from agent_memory.errors import Refused
from agent_memory.server import gate
from agent_memory.server.gate import check_host, check_json, check_origin, read_body

OURS = [
    "localhost",
    "LocalHost:8000",
    "127.0.0.1",
    "127.0.0.1:1",
    "127.8.9.10",
    "[::1]",
    "[::1]:8000",
    "my-mac.local",
    "MY-MAC.local:80",
]
NOT_OURS = [
    "",
    "example.com",
    "localhost.example.com",
    "127.0.0.1.example.com",
    "localhost:",
    "localhost:x",
    "localhost:123456",
    "user@localhost",
    "localhost/",
    "::1",
    "[::1",
    "[::2]",
    "10.0.0.1",
    "0.0.0.0",
    "127.0.0.1, 127.0.0.1",
    "localhost localhost",
]


@pytest.mark.requirement("S-01")
@pytest.mark.parametrize("host", OURS)
def test_hosts_of_this_machine(host: str) -> None:
    check_host([host], {"my-mac.local"})


@pytest.mark.requirement("S-01")
@pytest.mark.parametrize("hosts", [[], ["localhost", "localhost"], *([host] for host in NOT_OURS)])
def test_hosts_of_elsewhere(hosts: list[str]) -> None:
    with pytest.raises(Refused) as caught:
        check_host(hosts, {"my-mac.local"})
    assert caught.value.status == 421


def headers(**values: str) -> Headers:
    return Headers({name.replace("_", "-"): value for name, value in values.items()})


@pytest.mark.parametrize("host", OURS[:-2])
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_origins_of_this_machine(scheme: str, host: str) -> None:
    check_origin(headers(origin=f"{scheme}://{host}", sec_fetch_site="same-site"))


def test_no_origin_is_no_browser() -> None:
    check_origin(headers())
    check_origin(headers(sec_fetch_site="none"))


@pytest.mark.requirement("S-02")
@pytest.mark.parametrize(
    "origin", ["null", "", "localhost", "file://", "ftp://localhost", "http://", "http://evil.com"]
)
def test_origins_of_elsewhere(origin: str) -> None:
    with pytest.raises(Refused) as caught:
        check_origin(headers(origin=origin))
    assert caught.value.status == 403


@pytest.mark.requirement("S-02")
def test_a_cross_site_request_without_origin() -> None:
    with pytest.raises(Refused):
        check_origin(headers(sec_fetch_site="cross-site"))


@pytest.mark.parametrize("value", ["application/json", "Application/JSON; charset=utf-8"])
def test_json(value: str) -> None:
    check_json(headers(content_type=value))


@pytest.mark.requirement("S-02")
@pytest.mark.parametrize("value", ["", "text/plain", "application/jsonp", "multipart/form-data"])
def test_not_json(value: str) -> None:
    with pytest.raises(Refused) as caught:
        check_json(headers(content_type=value))
    assert caught.value.status == 415


def arriving(*pieces: bytes, more_to_come: bool = False) -> Receive:
    """A client that sends these, then has ended its body or is silent for good."""
    messages = [{"type": "http.request", "body": piece, "more_body": True} for piece in pieces]
    messages[-1]["more_body"] = more_to_come

    async def receive() -> Message:
        return messages.pop(0) if messages else await asyncio.sleep(60, {})

    return receive


async def test_a_body_is_whole() -> None:
    assert await read_body(arriving(b"")) == b""
    assert await read_body(arriving(b"a", b"", b"bc")) == b"abc"
    assert await read_body(arriving(*[b"x" * (1 << 20)] * 8)) == b"x" * (8 << 20)


@pytest.mark.requirement("S-10")
async def test_a_body_too_large_is_read_to_its_end() -> None:
    receive = arriving(*[b"x" * (1 << 20)] * 8, b"x")
    with pytest.raises(Refused) as caught:
        await read_body(receive)
    assert (caught.value.status, caught.value.close) == (413, False)


@pytest.mark.requirement("S-10")
async def test_a_body_beyond_measure_is_not() -> None:
    receive = arriving(*[b"x" * (1 << 20)] * 40)
    with pytest.raises(Refused) as caught:
        await read_body(receive)
    assert (caught.value.status, caught.value.close) == (413, True)
    assert (await receive())["body"]


@pytest.mark.requirement("S-10")
async def test_a_body_too_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "BODY_S", 0.1)
    with pytest.raises(Refused) as caught:
        await read_body(arriving(b"{", more_to_come=True))
    assert (caught.value.status, caught.value.close) == (408, True)


async def test_a_client_that_goes_while_it_sends() -> None:
    async def receive() -> Message:
        return {"type": "http.disconnect"}

    assert await read_body(receive) is None
