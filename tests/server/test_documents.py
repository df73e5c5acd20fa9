"""What docs/http-api.md and docs/shutdown.md say is so."""

import re

from agent_memory.block import Loss
from agent_memory.engine.explain import Cause
from agent_memory.server import (
    app,
    chat,
    gate,
    identity,
    response_items,
    response_tools,
    responses,
)
from agent_memory.server import response_store as store
from agent_memory.server.explain import MEANING
from agent_memory.stages import BUDGETS_S, HARD_DEADLINE_S
from tests.source import ROOT

API = (ROOT / "docs/http-api.md").read_text("utf-8")
SHUTDOWN = (ROOT / "docs/shutdown.md").read_text("utf-8")


def test_every_route_is_described() -> None:
    for route in app.ROUTES:
        assert re.sub(r"{\w+(:path)?}", "{id}", route.path) in API


def test_every_cause_of_a_miss_is_described() -> None:
    about = API.split("/explain\n")[1].split("\n## ")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", about, re.MULTILINE)) >= set(Cause)
    assert {loss for loss in Loss if f"`{loss}`" in about} == set(Loss)
    assert set(MEANING) == set(Cause)


def test_every_refused_field_is_listed_with_what_is_accepted() -> None:
    table = API.split("### Refused")[1].split("###")[0]
    for name in chat.NOT_BUILT:
        assert f"`{name}`" in table


def test_what_responses_take_refuse_and_keep_is_listed() -> None:
    about = API.split("## POST /v1/responses\n")[1].split("\n## ")[0]
    refused = about.split("### Refused by responses")[1].split("###")[0]
    assert set(re.findall(r"`(\w+)`", refused)) >= set(responses.NOT_BUILT)
    echoed = responses.parse({"input": "x"}, {}).echo
    assert [name for name in echoed if f"`{name}" not in about] == []
    assert all(f"`{kind}" in about for kind in (*response_items.NAMES, *response_tools.IGNORED))
    kept = f"{store.MOST:,} responses are kept, {store.MOST_BYTES >> 30} GiB of them"
    assert kept in about and f"{store.MOST_DAYS} days" in about


def test_the_names_of_agents_come_in_this_order() -> None:
    listed = re.findall(r"^\d+\. (.*)", API, re.MULTILINE)
    names = [name.lower() for line in listed for name in re.findall(r"`([A-Za-z_-]+)`", line)]
    assert names[: len(identity.HEADERS) + 1] == [identity.EXPLICIT, *identity.HEADERS]
    assert len(listed) == 10


def test_limits_are_those_of_the_gate() -> None:
    assert f"at most {gate.MAX_BODY_BYTES >> 20} MiB" in API
    assert f"within {gate.BODY_S:.0f} s" in API


def test_stages_and_their_seconds() -> None:
    rows = re.findall(r"^\| (\d) \| `(\w+)` \| .* \| (.*) \|$", SHUTDOWN, re.MULTILINE)
    assert [(name, float(seconds.split(" + ")[-1])) for _, name, seconds in rows] == [
        (str(stage), seconds) for stage, seconds in BUDGETS_S.items()
    ]
    assert f"plus {HARD_DEADLINE_S} s" in SHUTDOWN
