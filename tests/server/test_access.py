"""A server with keys: who gets in, what others hear, and what its log holds of it all."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from starlette.datastructures import Headers

from agent_memory.errors import Unauthorized
from agent_memory.keys import Caller, Keys, parse
from agent_memory.server import access, anthropic, app
from agent_memory.server.access import Names, caller
from tests.process import CHAT, Server, chat

ONE, TWO = "sk-marked-key-number-one", "sk-marked-key-number-two"
WRONG = "sk-marked-key-that-is-wrong"
WORD = "marzipanned"
"""Said in every prompt."""


@pytest.fixture(scope="module")
def keys_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("keys") / "keys"
    file.write_text(f"{ONE}\n{TWO}\n")
    file.chmod(0o600)
    return file


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory, keys_file: Path) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("locked")
    with Server(folder, "--api-keys-file", str(keys_file)) as server:
        yield server.wait_ready()


@pytest.fixture(scope="module")
def client(locked: Server) -> Iterator[httpx.Client]:
    """One that has a key."""
    bearer = {"Authorization": f"Bearer {ONE}", "X-Agent-ID": "ada"}
    with httpx.Client(base_url=locked.url, headers=bearer, timeout=60) as client:
        yield client


def brought(**headers: str) -> Headers:
    return Headers({name.replace("_", "-"): value for name, value in headers.items()})


@pytest.mark.requirement("B-09")
@pytest.mark.parametrize("headers", [{}, {"authorization": f"Bearer {WRONG}"}, {"x_api_key": ONE}])
def test_without_keys_none_is_asked_for_and_any_is_ignored(headers: dict[str, str]) -> None:
    assert caller("/v1/models", brought(**headers), Keys()) == Caller()


@pytest.mark.requirement("B-09")
@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({"authorization": f"Bearer {ONE}"}, None),
        ({"authorization": f"bearer  {TWO} "}, None),
        ({"x_api_key": TWO}, None),
        ({"authorization": f"Bearer {WRONG}", "x_api_key": ONE}, None),
        ({}, "missing_api_key"),
        ({"authorization": ONE}, "missing_api_key"),
        ({"authorization": f"Basic {ONE}"}, "missing_api_key"),
        ({"authorization": "Bearer "}, "missing_api_key"),
        ({"x_api_key": ""}, "missing_api_key"),
        ({"x_api_key": WRONG}, "invalid_api_key"),
        ({"x_api_key": f"{ONE},{TWO}"}, "invalid_api_key"),
        ({"authorization": "Bearer ÿÿÿÿÿÿÿÿÿÿÿÿÿÿÿÿ"}, "invalid_api_key"),
    ],
)
def test_a_key_may_come_in_two_ways(headers: dict[str, str], code: str | None) -> None:
    known = parse(f"{ONE},{TWO}")
    if code is None:
        assert caller("/v1/models", brought(**headers), known) == Caller()
        assert caller("/readyz", brought(**headers), known).trusted
        return
    assert not caller("/readyz", brought(**headers), known).trusted
    with pytest.raises(Unauthorized) as caught:
        caller("/v1/models", brought(**headers), known)
    assert (caught.value.status, caught.value.code) == (401, code)


def every_route() -> list[tuple[str, str]]:
    """(method, path), with something in place of each id."""
    return [
        (method, re.sub(r"{\w+(:path)?}", "some-id", route.path))
        for route in app.ROUTES
        for method in sorted(route.methods or ())
    ]


@pytest.mark.requirement("B-09", "S-06", "S-03")
def test_every_route_but_those_listed_wants_a_key(locked: Server) -> None:
    routes = every_route()
    assert len(routes) > 40 and {path for _, path in routes} >= set(access.OPEN)
    assert set(access.OPEN) == {"/health", "/healthz", "/readyz"}
    with httpx.Client(base_url=locked.url, timeout=10) as stranger:
        for method, path in [
            *routes,
            ("GET", "/no/such/route"),
            ("GET", "/healthz/"),
            ("GET", "//"),
        ]:
            for headers in ({}, {"x-api-key": WRONG}):
                answer = stranger.request(method, path, headers=headers)
                if path in access.OPEN:
                    assert answer.status_code == 200, path
                    continue
                assert answer.status_code == 401, (method, path)
                assert answer.headers["WWW-Authenticate"] == "Bearer"
                assert answer.headers["X-Request-ID"]
                if method != "HEAD":
                    told = answer.json()
                    assert told["error"]["message"] and "builtin" not in answer.text
                    kind = (
                        "authentication_error"
                        if anthropic.is_here(path)
                        else "invalid_request_error"
                    )
                    assert told["error"]["type"] == kind


@pytest.mark.requirement("B-09", "S-06")
def test_what_is_open_names_nothing_to_strangers(locked: Server, client: httpx.Client) -> None:
    assert locked.get("/readyz").json() == {"status": "ready"}
    assert {"model": "builtin"}.items() <= client.get("/readyz").json().items()
    assert set(locked.get("/healthz").json()) == {"status", "phase", "engine"}


@pytest.mark.requirement("B-09")
def test_a_refused_body_is_read_and_the_connection_goes_on(locked: Server) -> None:
    with httpx.Client(base_url=locked.url, timeout=30) as stranger:
        for _ in range(2):
            assert stranger.post(CHAT, json=chat("x" * (1 << 20))).status_code == 401
        assert stranger.post(CHAT, json=chat("Hi"), headers={"x-api-key": TWO}).status_code == 200


def run(*args: str, **environ: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("AGENT_MEMORY_")}
    command = [sys.executable, "-m", "agent_memory", *args]
    return subprocess.run(command, env=kept | environ, capture_output=True, text=True, timeout=30)


def test_our_own_commands_bring_the_key(
    locked: Server, client: httpx.Client, keys_file: Path
) -> None:
    answer = client.post(CHAT, json=chat("Hello"), headers={"X-Request-ID": "explained"})
    assert answer.status_code == 200
    with_url = ("--url", locked.url)
    for args in (
        ("agents", "ls", "--json", *with_url),
        ("models", "ls", "--json", *with_url),
        ("models", "load", "builtin", "--json", *with_url),
        ("explain", "explained", "--json", *with_url),
        ("status", "--json", "--state-dir", str(locked.state_dir)),
    ):
        by_variable = run(*args, AGENT_MEMORY_API_KEY=TWO)
        assert by_variable.returncode == 0, by_variable.stderr
        by_file = run(*args, "--api-key-file", str(keys_file))
        assert by_file.returncode == 0, by_file.stderr
    refused = run("agents", "ls", *with_url)
    assert refused.returncode == 1 and "AGENT_MEMORY_API_KEY or --api-key-file" in refused.stderr
    told = json.loads(run("status", "--json", "--state-dir", str(locked.state_dir)).stdout)
    assert told["phase"] == "ready" and told["model"] is None and told["key_wanted"]


@pytest.mark.parametrize("how", ["variable", "file"])
@pytest.mark.parametrize("name", ["claude", "codex", "opencode"])
def test_clients_are_launched_with_the_key_and_it_is_not_printed(
    locked: Server, keys_file: Path, tmp_path: Path, name: str, how: str
) -> None:
    program = tmp_path / name
    program.write_text(
        f"#!{sys.executable}\nimport json, os; print(json.dumps(dict(os.environ)))\n"
    )
    program.chmod(0o755)
    given = ("--api-key-file", str(keys_file)) if how == "file" else ()
    environ = {"AGENT_MEMORY_API_KEY": ONE} if how == "variable" else {}
    printed = run("launch", name, "--url", locked.url, *given, **environ)
    assert printed.returncode == 0, printed.stderr
    assert ONE not in printed.stdout
    shell = ["/bin/sh", "-c", printed.stdout]
    path = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    seen = json.loads(subprocess.check_output(shell, env=environ | path, timeout=20))
    wanted = "ANTHROPIC_AUTH_TOKEN" if name == "claude" else "AGENT_MEMORY_API_KEY"
    assert seen[wanted] == ONE


def test_names_of_an_open_host() -> None:
    called = {"server": ("192.168.0.7", 8000)}
    assert Names(None).of(called) == Names("127.0.0.1").of(called) - {"127.0.0.1"} == frozenset()
    assert {"0.0.0.0", "192.168.0.7"} < Names("0.0.0.0").of(called)
    assert "my-mac.local" in Names("My-Mac.local").of({"server": None})


@pytest.mark.requirement("S-05")
def test_another_host_is_served_with_keys(tmp_path: Path, keys_file: Path) -> None:
    with Server(tmp_path, "--host", "0.0.0.0", "--api-keys-file", str(keys_file)) as server:
        (warned,) = server.events("keys_and_prompts_cross_the_network_in_plain_http")
        assert warned["level"] == "warning" and warned["host"] == "0.0.0.0"
        for host, status in (
            ("localhost", 200),
            (f"0.0.0.0:{server.port}", 200),
            ("example.com", 421),
            ("8.8.8.8", 421),
        ):
            answer = server.call("GET", "/healthz", headers={"Host": host})
            assert answer.status_code == status, host
        assert server.get("/v1/models").status_code == 401


# ── what is written down ─────────────────────────────────────────────────────────────────────


def say_it_everywhere(client: httpx.Client) -> None:
    """To each API, whole, streamed, refused and misused."""
    told = chat(WORD, max_tokens=4)
    messages = told["messages"]
    bodies: list[tuple[str, object]] = [
        (CHAT, told),
        (CHAT, {**told, "stream": True, "user": WORD * 20}),
        (CHAT, {**told, "temperature": WORD}),
        (CHAT, {**told, WORD: WORD, "tools": WORD}),
        (CHAT, {"messages": [{"role": WORD, "content": WORD}]}),
        ("/v1/completions", {"prompt": WORD, "max_tokens": 4, "echo": True, "logprobs": 1}),
        ("/v1/responses", {"input": WORD, "max_output_tokens": 16}),
        ("/v1/responses", {"input": WORD, "previous_response_id": WORD}),
        ("/v1/messages", {"messages": messages, "max_tokens": 4, "stream": True}),
        ("/v1/messages", {"messages": messages, "max_tokens": WORD}),
        ("/v1/messages/count_tokens", {"messages": messages}),
        ("/v1/batches", {"input_file_id": WORD}),
        ("/v1/agents/ada/fork", {"name": "ben"}),
        ("/v1/agents/ada/rewind", {"tokens": 3}),
        ("/v1/agents/ada/warm", {}),
        (f"/{WORD}", {}),
    ]
    statuses = {client.post(path, json=body).status_code for path, body in bodies}
    assert statuses == {200, 201, 400, 404}, statuses
    assert client.post(CHAT, content=f'{{"{WORD}"', headers=JSON).status_code == 400
    assert client.post(CHAT, json=told, headers={"x-api-key": WRONG}).status_code == 200
    line = {"custom_id": "a", "method": "POST", "url": CHAT, "body": told}
    file = client.post(
        "/v1/files", files={"file": (WORD, json.dumps(line))}, data=FOR_A_BATCH
    ).json()
    batch = {"input_file_id": file["id"], "endpoint": CHAT, "completion_window": "24h"}
    assert client.post("/v1/batches", json=batch).status_code == 200
    shown = client.get("/v1/agents/ada?text=true")
    assert shown.status_code == 200
    exported = client.get("/v1/agents/ada/export").content
    tar = {"Content-Type": "application/x-tar"}
    params = {"name": "eve"}
    assert client.post("/v1/agents/import", content=exported, headers=tar, params=params).is_success
    assert client.delete("/v1/agents/ben").is_success


JSON = {"Content-Type": "application/json"}
FOR_A_BATCH = {"purpose": "batch"}


@pytest.mark.requirement("S-07", "S-27")
def test_no_key_and_no_prompt_is_ever_logged(tmp_path: Path, keys_file: Path) -> None:
    """A whole session of all APIs, to the end of the process."""
    with Server(tmp_path, "--api-keys-file", str(keys_file)) as server:
        server.wait_ready()
        for key in (ONE, WRONG):
            headers = {"Authorization": f"Bearer {key}", "X-Agent-ID": "ada"}
            with httpx.Client(base_url=server.url, headers=headers, timeout=60) as client:
                if key == ONE:
                    say_it_everywhere(client)
                else:
                    assert client.post(CHAT, json=chat(WORD)).status_code == 401
        assert server.stop().exit_code == 0
        written = [server.log(), *(file.read_text() for file in server.state_dir.glob("run/*"))]
    assert "request_done" in written[0] and "request_refused" in written[0]
    for text in written:
        assert not re.search(f"{WORD}|marked-key", text), text
