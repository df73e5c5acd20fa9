"""Two tenants on one server: neither sees, changes or notices what is the other's."""

import json
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.routing import Route

from agent_memory.server import app
from agent_memory.store import look
from agent_memory.store.state_dir import StateDir
from tests.conftest import ordinary_text
from tests.process import CHAT, ENDLESS, Server, chat

NAMES = ("owner", "acme", "zoo", "silent")
OWNER, ACME, ZOO, SILENT = (f"sk-of-{name}-and-long-enough" for name in NAMES)
ACME_TOO = "sk-another-key-of-acme"
KEYS = f"{OWNER}\nacme:{ACME}\nzoo: {ZOO}\nacme:{ACME_TOO}\n"
"""And `silent`, who leaves nothing, where it is added."""
LONG = "Read this:\n" + ordinary_text()[:2500]
TAR = {"Content-Type": "application/x-tar"}


class Client(httpx.Client):
    """Whoever has this key."""

    def __init__(self, server: Server, key: str) -> None:
        named = {"x-api-key": key}
        super().__init__(base_url=server.url, headers=named, timeout=60, verify=False)

    def ask(self, text: str, agent: str | None = None, **fields: object) -> dict[str, Any]:
        headers = {"X-Agent-ID": agent} if agent else {}
        answer = self.post(CHAT, json=chat(text, max_tokens=8, **fields), headers=headers)
        assert answer.status_code == 200, answer.text
        told: dict[str, Any] = answer.json()
        return told

    def cached(self, text: str, agent: str | None = None) -> int:
        return int(self.ask(text, agent)["usage"]["prompt_tokens_details"]["cached_tokens"])

    def agents(self) -> set[str]:
        return {one["id"] for one in self.get("/v1/agents").json()["data"]}

    def wait_on_disk(self, agent: str) -> dict[str, Any]:
        def on_disk() -> bool:
            view = self.get(f"/v1/agents/{agent}").json()
            return bool("tiers" in view and view["tiers"]["disk"] == view["tokens"])

        wait_until(on_disk)
        view: dict[str, Any] = self.get(f"/v1/agents/{agent}").json()
        return view

    def begin_batch(self, *bodies: dict[str, Any]) -> dict[str, Any]:
        lines = (
            json.dumps({"custom_id": str(n), "method": "POST", "url": CHAT, "body": body})
            for n, body in enumerate(bodies)
        )
        form = {"file": ("in", "\n".join(lines))}
        file = self.post("/v1/files", files=form, data={"purpose": "batch"}).json()
        asked = {"input_file_id": file["id"], "endpoint": CHAT, "completion_window": "24h"}
        batch: dict[str, Any] = self.post("/v1/batches", json=asked).json()
        return batch

    def wait_completed(self, batch: dict[str, Any]) -> dict[str, Any]:
        path = f"/v1/batches/{batch['id']}"
        wait_until(lambda: self.get(path).json()["status"] == "completed")
        ended: dict[str, Any] = self.get(path).json()
        return ended


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def of(answer: dict[str, Any]) -> str:
    text: str = answer["choices"][0]["message"]["content"]
    return text


def serving(folder: Path, *flags: str, more_keys: str = "") -> Server:
    file = folder / "keys"
    file.write_text(KEYS + more_keys)
    file.chmod(0o600)
    return Server(folder, "--api-keys-file", str(file), *flags)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("shared")
    with serving(folder, more_keys=f"silent:{SILENT}") as server:
        yield server.wait_ready()


@pytest.fixture(scope="module")
def clients(shared: Server) -> Iterator[tuple[Client, Client, Client]]:
    """(owner, acme, zoo)"""
    with Client(shared, OWNER) as owner, Client(shared, ACME) as acme, Client(shared, ZOO) as zoo:
        yield owner, acme, zoo


@pytest.fixture(scope="module")
def left(clients: tuple[Client, Client, Client]) -> dict[str, str]:
    """What acme has left, by the name that it has in paths."""
    _, acme, _ = clients
    acme.ask(LONG, "ada", user="ignored")
    acme.wait_on_disk("ada")
    response = acme.post("/v1/responses", json={"input": "Hello", "max_output_tokens": 16}).json()
    assert response["store"] is True
    batch = acme.wait_completed(acme.begin_batch(chat("Hello", max_tokens=4, user="in-a-batch")))
    wait_until(lambda: "in-a-batch" in acme.agents())
    body, named = chat("Hello", max_tokens=4), {"X-Request-ID": "asked-by-acme"}
    assert acme.post(CHAT, json=body, headers=named).status_code == 200
    return {
        "agent_id": "ada",
        "response_id": response["id"],
        "file_id": batch["output_file_id"],
        "batch_id": batch["id"],
        "request_id": "asked-by-acme",
    }


UNKNOWN = {
    "agent_id": "unheard-of",
    "response_id": "resp_0000000000000000unknown",
    "file_id": "file-unknown",
    "batch_id": "batch_unknown",
    "request_id": "asked-by-nobody",
}
BODIES: dict[str, dict[str, object]] = {"fork": {"name": "new"}, "rewind": {"tokens": 1}}
"""What a verb needs; {} does for the others."""
LISTS = {"/v1/agents", "/v1/files", "/v1/batches"}
OF_MODELS = {"/v1/models", "/v1/models/{model_id:path}"}
SHOWN_TO_ALL = {"/", "/health", "/healthz", "/readyz", "/openapi.json"} | OF_MODELS
BY_BODY = {
    *(CHAT, "/v1/completions", "/v1/messages", "/v1/messages/count_tokens", "/v1/responses"),
    *("/v1/files", "/v1/batches", "/v1/agents/import"),
}
"""POST: what they name of others' is in the body, see the tests below."""


def ids_in(path: str) -> list[str]:
    return re.findall(r"{(\w+)(?::path)?}", path)


def each(routes: list[Route]) -> list[tuple[str, str]]:
    return [(method, route.path) for route in routes for method in sorted(route.methods or ())]


def ask_of(client: Client, method: str, path: str, ids: dict[str, str]) -> tuple[int, str]:
    """(status, body), with one word in place of each id."""
    place = re.sub(r"{(\w+)(?::path)?}", lambda found: ids[found[1]], path)
    body = BODIES.get(path.rpartition("/")[2], {}) if method == "POST" else None
    answer = client.request(method, place, json=body)
    text = answer.text
    for known in ids.values():
        text = text.replace(known, "ID")
    return answer.status_code, text


@pytest.mark.requirement("S-08")
def test_no_route_knows_what_is_anothers(
    shared: Server, clients: tuple[Client, Client, Client], left: dict[str, str]
) -> None:
    """Of every route that there is; a new one fails here until it keeps tenants apart."""
    owner, acme, zoo = clients
    before = {path: acme.get(path).json() for path in LISTS}
    with Client(shared, SILENT) as silent:
        assert num_that_know_nothing(left, owner, zoo, silent) > 20
    assert before == {path: acme.get(path).json() for path in LISTS}
    for path in ("/v1/agents/{agent_id}", "/v1/responses/{response_id}", "/v1/files/{file_id}"):
        assert ask_of(acme, "GET", path, left)[0] == 200
    assert ask_of(acme, "GET", "/v1/batches/{batch_id}", left)[0] == 200
    assert ask_of(acme, "GET", "/v1/requests/{request_id}/explain", left)[0] == 200


def num_that_know_nothing(left: dict[str, str], *strangers: Client) -> int:
    """Of the routes those with an id; the last of the strangers has left nothing."""
    tried = 0
    for method, path in each(app.OF_EACH):
        reads = method in ("GET", "HEAD")
        if ids_in(path) and path not in OF_MODELS:
            for stranger in strangers:
                status, text = ask_of(stranger, method, path, left)
                assert (status, text) == ask_of(stranger, method, path, UNKNOWN), (method, path)
                assert status == 404, (method, path)
            tried += 1
        elif path in LISTS and reads:
            listed = strangers[-1].request(method, path)
            assert listed.status_code == 200
            assert method == "HEAD" or listed.json()["data"] == [], path
        else:
            assert path in (SHOWN_TO_ALL if reads else BY_BODY), (method, path)
    return tried


@pytest.mark.requirement("S-08")
def test_what_a_body_names_is_anothers(
    clients: tuple[Client, Client, Client], left: dict[str, str]
) -> None:
    _, _, zoo = clients
    named: list[tuple[str, dict[str, Any], str]] = [
        ("/v1/responses", {"input": "Go on", "previous_response_id": "ID"}, "response_id"),
        ("/v1/responses", {"input": [{"type": "item_reference", "id": "ID"}]}, "item"),
        (
            "/v1/batches",
            {"input_file_id": "ID", "endpoint": CHAT, "completion_window": "24h"},
            "file_id",
        ),
    ]
    item = clients[1].get(f"/v1/responses/{left['response_id']}").json()["output"][0]["id"]
    for path, body, what in named:
        texts = []
        for known in ({**left, "item": item}, {**UNKNOWN, "item": "msg_unknown_0"}):
            answer = zoo.post(
                path, content=json.dumps(body).replace("ID", known[what]), headers=JSON
            )
            assert answer.status_code == 404, answer.text
            texts.append(answer.text.replace(known[what], "ID"))
        assert texts[0] == texts[1]


JSON = {"Content-Type": "application/json"}


@pytest.mark.requirement("S-08")
def test_the_same_names_are_two_agents(clients: tuple[Client, Client, Client]) -> None:
    """Each has its own, in all that has a name; who has two keys has one memory."""
    owner, acme, zoo = clients
    for client, word in ((owner, "one"), (acme, "two"), (zoo, "three")):
        client.ask(f"Say {word}.", "twin")
        body, named = chat(f"Say {word}.", max_tokens=4), {"X-Request-ID": "the-same"}
        assert client.post(CHAT, json=body, headers={**named, "X-Agent-ID": "twin"}).is_success
    wait_until(lambda: all("twin" in client.agents() for client in clients))
    for client, word in ((owner, "one"), (acme, "two"), (zoo, "three")):
        text = client.get("/v1/agents/twin?text=true").json()["heads"][0]["turns"][0]["prompt"]
        assert f"Say {word}." in text
        explained = client.get("/v1/requests/the-same/explain").json()
        assert (explained["agent"], explained["cause"]) == ("twin", "none")
    created = zoo.post("/v1/agents/twin/fork", json={"name": "ada"})
    assert created.status_code == 201 and created.json()["id"] == "ada"
    assert created.headers["location"] == "/v1/agents/ada"
    taken = zoo.post("/v1/agents/twin/fork", json={"name": "ada"})
    assert taken.status_code == 409 and "'ada'" in taken.json()["error"]["message"]
    assert zoo.delete("/v1/agents/ada").status_code == 204
    assert zoo.delete("/v1/agents/twin").status_code == 204
    assert "twin" in acme.agents() and "twin" in owner.agents() and "twin" not in zoo.agents()
    assert zoo.get("/v1/requests/the-same/explain").status_code == 404
    assert acme.get("/v1/requests/the-same/explain").status_code == 200
    for client in (owner, acme):
        assert client.delete("/v1/agents/twin").status_code == 204


@pytest.mark.requirement("S-08")
@pytest.mark.parametrize("name", ["acme/ada", "acme%2Fada", "acme%252Fada", "zoo/../acme/ada"])
def test_no_name_leads_into_another_tenant(
    clients: tuple[Client, Client, Client], left: dict[str, str], name: str
) -> None:
    owner, acme, zoo = clients
    for client in (owner, zoo, acme):
        assert client.get(f"/v1/agents/{name}").status_code in (400, 404)
        assert client.delete(f"/v1/agents/{name}").status_code in (400, 404)
        refused = client.post(CHAT, json=chat("Hi"), headers={"X-Agent-ID": name})
        assert refused.status_code == 400
        assert client.ask("Hi", user=name)["usage"]
        assert client.post("/v1/agents/ada/fork", json={"name": name}).status_code in (400, 404)
    assert acme.get("/v1/agents/ada").status_code == 200


@pytest.mark.requirement("S-09")
def test_the_same_prompt_of_another_tenant_is_as_if_it_were_the_first(tmp_path: Path) -> None:
    """Whether an agent has said it or nobody by name: for every other tenant nothing is there."""
    with serving(tmp_path, more_keys=f"silent:{SILENT}") as server, ExitStack() as stack:
        server.wait_ready()
        owner, acme, acme_too, zoo, silent = (
            stack.enter_context(Client(server, key)) for key in (OWNER, ACME, ACME_TOO, ZOO, SILENT)
        )
        for agent, strangers in (("kim", (zoo, owner)), (None, (silent,))):
            text = f"Tell {agent}:\n" + ordinary_text()[5000:8000]
            whole = acme.ask(text, agent)["usage"]["prompt_tokens"]
            for stranger in strangers:
                first = stranger.post(CHAT, json=chat(text, max_tokens=8))
                assert first.headers["X-Cache"] == "miss; cause=never_seen"
                details = first.json()["usage"]["prompt_tokens_details"]
                assert details["cached_tokens"] == 0
            for client in (acme, acme_too, *strangers):
                assert client.cached(text) == client.cached(text, "lee") == whole - 1


@pytest.mark.requirement("S-22")
def test_what_concerns_all_is_the_owners(clients: tuple[Client, Client, Client]) -> None:
    owner, acme, zoo = clients
    for method, path in each(app.OF_ALL):
        place = path.replace("{model_id:path}", "no-such-model")
        body: dict[str, object] | None = {} if method == "POST" else None
        for client in (acme, zoo):
            refused = client.request(method, place, json=body)
            assert refused.status_code == 403, place
            if method != "HEAD":
                assert refused.json()["error"]["code"] == "owner_key_needed"
        assert owner.request(method, place, json=body).status_code in (200, 404), place
    assert {path for _, path in each(app.OF_ALL)} == {
        *("/metrics", "/v1/models/{model_id:path}/load", "/v1/models/{model_id:path}/unload")
    }


@pytest.mark.requirement("S-08")
def test_an_agent_moves_from_one_tenant_to_another(clients: tuple[Client, Client, Client]) -> None:
    """It goes on there as where it came from, and is another's from then on."""
    owner, acme, zoo = clients
    text = "Move on:\n" + ordinary_text()[10_000:13_000]
    cold = acme.ask(text, "mover")
    acme.wait_on_disk("mover")
    exported = acme.get("/v1/agents/mover/export")
    assert b"acme" not in exported.content[:4096] and "acme" not in str(exported.headers)
    for client in (zoo, owner):
        created, again = (
            client.post("/v1/agents/import", content=exported.content, headers=TAR)
            for _ in range(2)
        )
        assert created.status_code == 201 and created.json()["id"] == "mover"
        assert again.status_code == 409
        moved = client.ask(text, "mover")
        usage = moved["usage"]
        assert usage["prompt_tokens_details"]["cached_tokens"] == usage["prompt_tokens"] - 1
        assert of(moved) == of(cold)
        assert client.delete("/v1/agents/mover").status_code == 204
    assert acme.cached(text) == cold["usage"]["prompt_tokens"] - 1


@pytest.mark.requirement("S-08", "S-09")
def test_after_a_restart_each_finds_its_own(tmp_path: Path) -> None:
    """The agent of a tenant goes on from disk with the cold answer; what a batch had not answered
    yet it answers then, in its tenant's memory."""
    with serving(tmp_path) as server:
        server.wait_ready()
        with Client(server, ACME) as acme, Client(server, ZOO) as zoo:
            cold = of(acme.ask(LONG, "ada"))
            assert of(zoo.ask(LONG, "ben")) == cold
            acme.wait_on_disk("ada")
            zoo.wait_on_disk("ben")
            kept = acme.post("/v1/responses", json={"input": "Hello", "max_output_tokens": 16})
            bodies = (chat(f"Count to {n}", max_tokens=4, user=f"line-{n}") for n in range(20))
            batch = acme.begin_batch(*bodies)
        server.signal(signal.SIGKILL)
        assert server.wait(10) == -signal.SIGKILL
    with serving(tmp_path) as server:
        server.wait_ready()
        with ExitStack() as stack:
            owner, acme, zoo = (
                stack.enter_context(Client(server, key)) for key in (OWNER, ACME, ZOO)
            )
            assert owner.cached(LONG) == 0
            for client, agent in ((acme, "ada"), (zoo, "ben")):
                warm = client.ask(LONG, agent)
                cached = warm["usage"]["prompt_tokens_details"]["cached_tokens"]
                assert cached == warm["usage"]["prompt_tokens"] - 1 and of(warm) == cold
            path = f"/v1/responses/{kept.json()['id']}"
            assert acme.get(path).status_code == 200
            assert zoo.get(path).status_code == owner.get(path).status_code == 404
            acme.wait_completed(batch)
            lines = {f"line-{n}" for n in range(20)}
            wait_until(lambda: lines < acme.agents())
            assert zoo.agents() == {"ben"} and owner.agents() == set()
        assert server.stop().exit_code == 0
    assert "check_failed" not in server.log()
    seen = look.look(StateDir.unlocked(server.state_dir))
    kept_by = {agent.agent.id for agent in seen.agents}
    assert kept_by == {"acme/ada", "zoo/ben", *(f"acme/{name}" for name in lines)}


@pytest.mark.requirement("S-11")
def test_one_tenant_cannot_take_all_places(tmp_path: Path) -> None:
    """Of 12 places each of the three has 2, and 6 are for whoever comes."""
    with serving(tmp_path, "--max-requests", "12").wait_ready() as server, ExitStack() as stack:
        owner, acme, zoo = (stack.enter_context(Client(server, key)) for key in (OWNER, ACME, ZOO))
        body, answers = chat(ENDLESS, stream=True), []
        for n in range(8):
            named = {"X-Agent-ID": f"agent-{n}"}
            begun = stack.enter_context(acme.stream("POST", CHAT, json=body, headers=named))
            assert begun.status_code == 200
            answers.append(begun.iter_lines())  # one that nobody has any more ends its request
            assert next(answers[n])
        refused = acme.post(CHAT, json=chat("Hi"))
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "queue_full"
        assert acme.get("/readyz").status_code == 503
        for client in (zoo, owner):
            assert client.get("/readyz").status_code == 200
            assert client.ask("Hi")["usage"]
