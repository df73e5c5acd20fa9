"""Files and batches over real sockets, and through everything that ends a process."""

import json
import signal
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from agent_memory.server.batch_lines import MAX_LINE_BYTES, Journal, count, lines
from tests.process import CHAT, ENDLESS, Server, chat

COMPLETIONS = "/v1/completions"
MESSAGES = "/v1/messages"
RESPONSES = "/v1/responses"
Answers = dict[str | None, dict[str, Any]]


def line(custom_id: str, body: dict[str, Any], url: str = CHAT) -> dict[str, Any]:
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


def upload(server: Server, raw: bytes, name: str = "in.jsonl", purpose: str = "batch") -> Any:
    files = {"file": (name, raw)}
    return server.call("POST", "/v1/files", files=files, data={"purpose": purpose})


def raw_lines(*items: object) -> bytes:
    texts = (item if isinstance(item, str) else json.dumps(item) for item in items)
    return "\n".join(texts).encode()


def begin(server: Server, raw: bytes, url: str = CHAT, window: str = "24h") -> dict[str, Any]:
    file = upload(server, raw).json()
    asked = {"input_file_id": file["id"], "endpoint": url, "completion_window": window}
    answer = server.post(asked, "/v1/batches")
    assert answer.status_code == 200, answer.text
    batch: dict[str, Any] = answer.json()
    return batch


def now(server: Server, batch: dict[str, Any]) -> dict[str, Any]:
    told: dict[str, Any] = server.get(f"/v1/batches/{batch['id']}").json()
    return told


def wait_ended(server: Server, batch: dict[str, Any], *ends: str) -> dict[str, Any]:
    server.wait_until(lambda: now(server, batch)["status"] in (ends or ("completed",)))
    return now(server, batch)


def answers(server: Server, batch: dict[str, Any]) -> tuple[Answers, Answers]:
    """Those of the output file and of the error file."""
    found = []
    for name in ("output_file_id", "error_file_id"):
        text = server.get(f"/v1/files/{batch[name]}/content").text if batch[name] else ""
        entries = [json.loads(one) for one in text.splitlines()]
        by_id = {one["custom_id"]: one for one in entries}
        assert len(by_id) == len(entries)  # each line once
        found.append(by_id)
    return found[0], found[1]


def error_of(answer: httpx.Response, status: int) -> Any:
    assert answer.status_code == status, answer.text
    return answer.json()["error"]


# ── files ────────────────────────────────────────────────────────────────────────────────────


def test_a_file_is_kept_as_it_came(server: Server) -> None:
    raw = bytes(range(256)) * 300 + b"\r\n--not-the-boundary--\r\n"
    told = upload(server, raw, name="Zürich 日.jsonl").json()
    assert (told["bytes"], told["filename"]) == (len(raw), "Zürich 日.jsonl")
    assert (told["object"], told["purpose"], told["status"]) == ("file", "batch", "processed")
    path = f"/v1/files/{told['id']}"
    assert server.get(path).json() == told
    assert server.get(f"{path}/content").content == raw
    assert told in server.get("/v1/files").json()["data"]
    assert told not in server.get("/v1/files?purpose=batch_output").json()["data"]
    assert server.delete(path).json()["deleted"] is True
    assert error_of(server.delete(path), 404)["code"] == "file_not_found"
    assert server.get(f"{path}/content").status_code == server.get(path).status_code == 404


def test_a_list_comes_in_pages(server: Server) -> None:
    ids = {upload(server, b"x").json()["id"] for _ in range(5)}
    found, after = [], ""
    while True:
        page = server.get(f"/v1/files?limit=2{after}").json()
        assert 0 < len(page["data"]) <= 2 and page["last_id"] == page["data"][-1]["id"]
        found += [one["id"] for one in page["data"]]
        if not page["has_more"]:
            break
        after = f"&after={page['last_id']}"
    assert ids <= set(found) and len(found) == len(set(found))
    for query in ("limit=0", "limit=101", "limit=x", "limit=%C2%B2", "after=unknown"):
        assert error_of(server.get(f"/v1/files?{query}"), 400)["param"] == query.split("=")[0]


FORM = "multipart/form-data; boundary=b"
PURPOSE = b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
FILE = b'--b\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\ndata\r\n'


@pytest.mark.parametrize(
    ("content_type", "raw", "status"),
    [
        (FORM, PURPOSE + FILE + b"--b--\r\n", 200),
        (FORM, PURPOSE + FILE + b"--b--", 200),
        ('multipart/form-data; boundary="b"', FILE + PURPOSE + b"--b--\r\n", 200),
        (FORM, b"", 400),
        (FORM, b"nothing", 400),
        (FORM, b"--b--", 400),
        (FORM, PURPOSE + b"--b--", 400),
        (FORM, FILE + b"--b--", 400),
        (FORM, PURPOSE + FILE[:-2], 400),
        (FORM, PURPOSE + FILE, 400),
        (FORM, PURPOSE + FILE.replace(b"data", b"") + b"--b--", 400),
        (FORM, PURPOSE.replace(b"batch", b"fine-tune") + FILE + b"--b--", 400),
        (FORM, PURPOSE.replace(b' name="purpose"', b"") + FILE + b"--b--", 400),
        (FORM, 17 * PURPOSE + FILE + b"--b--", 400),
        (FORM, PURPOSE + b"--b" + FILE + b"--b--", 400),
        (FORM, PURPOSE + FILE.replace(b'="f"', b"*=utf-7''+2AA-") + b"--b--", 400),
        (FORM, PURPOSE + FILE.replace(b'="f"', b"*=undefined''f") + b"--b--", 400),
        ("multipart/form-data; boundary*=undefined''b", PURPOSE + FILE + b"--b--", 400),
        (FORM, b"--b\r\n" + b"x" * 100_000, 400),
        ("multipart/form-data", PURPOSE + FILE + b"--b--", 400),
        ("application/json", b"{}", 415),
    ],
    ids=lambda value: str(value)[-24:],
)
def test_forms(server: Server, content_type: str, raw: bytes, status: int) -> None:
    headers = {"Content-Type": content_type}
    answer = server.call("POST", "/v1/files", content=raw, headers=headers)
    assert answer.status_code == status, answer.text


def test_a_file_too_large_is_refused(server: Server) -> None:
    piece = bytes(1 << 20)
    with server.connect() as client:
        head = [
            "POST /v1/files HTTP/1.1",
            "Host: localhost",
            f"Content-Type: {FORM}",
            f"Content-Length: {300 << 20}",
        ]
        client.sendall("".join(f"{one}\r\n" for one in [*head, ""]).encode())
        answer = b""
        try:
            for _ in range(300):
                client.sendall(piece)
        except OSError:
            pass  # it has been closed
        answer = client.recv(65536)
    assert b"413" in answer and b"body_too_large" in answer
    server.wait_until(lambda: not list((server.state_dir / "tmp").iterdir()))


def test_a_page_of_another_site_leaves_nothing(server: Server) -> None:
    headers = {"Content-Type": FORM, "Origin": "http://evil.example"}
    raw = PURPOSE + FILE + b"--b--"
    answer = server.call("POST", "/v1/files", content=raw, headers=headers)
    assert answer.status_code == 403


# ── batches ──────────────────────────────────────────────────────────────────────────────────


def test_a_batch_says_what_single_requests_say(server: Server) -> None:
    asked = {f"q{n}": chat(f"What is {n}?", max_tokens=6) for n in range(12)}
    batch = begin(server, raw_lines(*(line(name, body) for name, body in asked.items())))
    assert (batch["object"], batch["status"]) == ("batch", "validating")
    ended = wait_ended(server, batch)
    assert ended["request_counts"] == {"total": 12, "completed": 12, "failed": 0}
    assert ended["error_file_id"] is None and ended["completed_at"] >= ended["created_at"]
    output, _ = answers(server, ended)
    assert output.keys() == asked.keys()
    for name, body in asked.items():
        told = output[name]["response"]
        assert (told["status_code"], output[name]["error"]) == (200, None)
        assert told["body"]["choices"] == server.post(body).json()["choices"]
    assert server.get(f"/v1/requests/{told['request_id']}/explain").status_code == 200
    assert ended in server.get("/v1/batches").json()["data"]


def test_lines_that_ask_nonsense_have_an_error_line_each(server: Server) -> None:
    good = line("good", {"prompt": ["a", "b"], "max_tokens": 2, "user": "batcher"}, COMPLETIONS)
    bad = {
        "no-method": {**good, "custom_id": "no-method", "method": "GET"},
        "elsewhere": {**good, "custom_id": "elsewhere", "url": CHAT},
        "no-body": {**good, "custom_id": "no-body", "body": []},
        "streamed": line("streamed", {"prompt": "a", "stream": True}, COMPLETIONS),
        "refused": line("refused", {"prompt": ""}, COMPLETIONS),
        "model": line("model", {"prompt": "a", "model": "other"}, COMPLETIONS),
    }
    nameless = ["nonsense", "[]", {**good, "custom_id": None}, good, '{"a": NaN}']
    raw = raw_lines(good, *bad.values(), "", *nameless)
    ended = wait_ended(server, begin(server, raw, COMPLETIONS))
    assert ended["request_counts"] == {"total": 12, "completed": 1, "failed": 11}
    text = server.get(f"/v1/files/{ended['error_file_id']}/content").text
    errors = [json.loads(one) for one in text.splitlines()]
    told = {one["custom_id"]: one for one in errors}
    assert told.keys() == {*bad, None} and len(errors) == 11
    assert told["streamed"]["error"]["message"].startswith("Line 5: 'body.stream'")
    assert told["refused"]["response"]["status_code"] == 400
    assert told["model"]["response"]["body"]["error"]["code"] == "model_not_found"
    output = server.get(f"/v1/files/{ended['output_file_id']}/content").text
    assert len(json.loads(output)["response"]["body"]["choices"]) == 2
    assert server.get("/v1/agents/batcher").status_code == 200


def test_messages_say_what_single_ones_say(server: Server) -> None:
    said = [{"role": "user", "content": "Hello"}]
    asked = {"max_tokens": 5, "messages": said, "temperature": 0}
    raw = raw_lines(line("good", asked, MESSAGES), line("bad", {}, MESSAGES))
    output, errors = answers(server, wait_ended(server, begin(server, raw, MESSAGES)))
    told = output["good"]["response"]["body"]
    assert told["type"] == "message"
    assert told["content"] == server.post(asked, MESSAGES).json()["content"]
    refused = errors["bad"]["response"]
    assert refused["status_code"] == 400
    alone = server.post({}, MESSAGES).json()
    assert refused["body"] == {**alone, "request_id": refused["request_id"]}


def test_responses_are_kept_and_gone_on_from(server: Server) -> None:
    first = {"input": "Hello", "max_output_tokens": 16, "temperature": 0, "user": "responder"}
    raw = raw_lines(line("good", first, RESPONSES), line("bad", {}, RESPONSES))
    output, errors = answers(server, wait_ended(server, begin(server, raw, RESPONSES)))
    told = output["good"]["response"]["body"]
    assert server.get(f"{RESPONSES}/{told['id']}").json() == told
    single = server.post(first, RESPONSES).json()
    assert said_in(told) == said_in(single) != ""
    refused = errors["bad"]["response"]
    assert (refused["status_code"], refused["body"]["error"]["param"]) == (400, "input")
    second = {**first, "input": "And now?", "previous_response_id": told["id"]}
    raw = raw_lines(line("on", second, RESPONSES))
    output, _ = answers(server, wait_ended(server, begin(server, raw, RESPONSES)))
    after = output["on"]["response"]["body"]
    cached = after["usage"]["input_tokens_details"]["cached_tokens"]
    assert cached >= told["usage"]["input_tokens"]
    assert said_in(after) == said_in(server.post(second, RESPONSES).json())


def said_in(response: dict[str, Any]) -> str:
    return "".join(part["text"] for item in response["output"] for part in item["content"])


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"endpoint": "/v1/embeddings"}, "endpoint"),
        ({"endpoint": None}, "endpoint"),
        ({"completion_window": "soon"}, "completion_window"),
        ({"completion_window": None}, "completion_window"),
        ({"input_file_id": "../../LOCK"}, "input_file_id"),
        ({"input_file_id": None}, "input_file_id"),
        ({"metadata": []}, "metadata"),
    ],
    ids=str,
)
def test_a_bad_batch_is_refused(server: Server, fields: dict[str, object], param: str) -> None:
    file = upload(server, b"\n").json()["id"]
    asked = {"input_file_id": file, "endpoint": CHAT, "completion_window": "1d"}
    answer = server.post({**asked, **fields}, "/v1/batches")
    error = error_of(answer, 404 if "LOCK" in str(fields) else 400)
    assert error["param"] == param
    assert error_of(server.post(asked, "/v1/batches"), 400)["param"] == "input_file_id"  # no lines


def test_a_batch_is_cancelled(server: Server) -> None:
    endless = [line(f"q{n}", chat(ENDLESS, max_tokens=4000)) for n in range(20)]
    batch = begin(server, raw_lines(line("quick", chat("Hi", max_tokens=1)), *endless))
    server.wait_until(lambda: now(server, batch)["request_counts"]["completed"] == 1)
    assert server.delete(f"/v1/files/{batch['input_file_id']}").status_code == 409
    cancelled = server.post({}, f"/v1/batches/{batch['id']}/cancel").json()
    assert cancelled["status"] in ("cancelling", "cancelled")
    ended = wait_ended(server, batch, "cancelled")
    output, errors = answers(server, ended)
    assert output.keys() == {"quick"} and len(errors) == 20
    assert {one["error"]["code"] for one in errors.values()} == {"batch_cancelled"}
    assert ended["request_counts"] == {"total": 21, "completed": 1, "failed": 20}
    again = server.post({}, f"/v1/batches/{batch['id']}/cancel")
    assert error_of(again, 409)["code"] == "batch_ended"
    assert server.delete(f"/v1/files/{batch['input_file_id']}").status_code == 200
    assert error_of(server.get("/v1/batches/batch_x"), 404)["code"] == "batch_not_found"


def test_a_batch_expires(server: Server) -> None:
    asked = [line(f"q{n}", chat(ENDLESS, max_tokens=4000)) for n in range(10)]
    ended = wait_ended(server, begin(server, raw_lines(*asked), window="1s"), "expired")
    output, errors = answers(server, ended)
    assert len(output) + len(errors) == 10 and errors
    assert {one["error"]["code"] for one in errors.values()} == {"batch_expired"}


def test_a_person_is_answered_while_a_batch_runs(server: Server) -> None:
    asked = [line(f"q{n}", chat(ENDLESS, max_tokens=400)) for n in range(16)]
    batch = begin(server, raw_lines(*asked))
    server.wait_until(lambda: now(server, batch)["status"] == "in_progress")
    assert server.ask("Hello", max_tokens=5).status_code == 200
    assert now(server, batch)["status"] == "in_progress"
    server.post({}, f"/v1/batches/{batch['id']}/cancel")
    wait_ended(server, batch, "cancelled")


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(signal.SIGKILL, id="kill"),
        pytest.param(signal.SIGTERM, id="term", marks=pytest.mark.slow),
    ],
)
def test_a_batch_goes_on_after_the_process_ended(tmp_path: Path, number: signal.Signals) -> None:
    asked = {f"q{n}": chat(f"Go on from {n}: 0 0 0", max_tokens=24) for n in range(24)}
    with Server(tmp_path) as server:
        batch = begin(
            server.wait_ready(), raw_lines(*(line(name, body) for name, body in asked.items()))
        )
        server.wait_until(lambda: now(server, batch)["request_counts"]["completed"] >= 6)
        journal = server.state_dir / "documents" / "batches" / f"{batch['id']}.data"
        server.signal(number)
        began = time.monotonic()
        code = server.wait(20)
        assert number is signal.SIGKILL or (code == 0 and time.monotonic() - began < 8)
        done = Journal(journal).done()
        assert 6 <= len(done) < 24
        with journal.open("ab") as file:
            file.write(b'{"line": 9, "good"')  # as if it had been writing
    with Server(tmp_path) as server:
        server.wait_ready()
        ended = wait_ended(server, batch)
        output, errors = answers(server, ended)
        assert output.keys() == asked.keys() and not errors
        assert ended["request_counts"] == {"total": 24, "completed": 24, "failed": 0}
        assert len(server.events("request_done")) == 24 - len(done)  # nothing twice
        sample = output["q3"]["response"]["body"]["choices"]
        assert sample == server.post(asked["q3"]).json()["choices"]
        assert not journal.exists()


# ── lines and the journal ────────────────────────────────────────────────────────────────────


def test_a_line_too_long_is_one_error(tmp_path: Path) -> None:
    path = tmp_path / "in"
    good = json.dumps(line("a", {}))
    path.write_text(f"{good}\n\n{'x' * (3 * MAX_LINE_BYTES)}\n{good.replace('a', 'b', 1)}")
    found = list(lines(path, CHAT))
    assert count(path) == len(found) == 3
    assert [one.number for one in found] == [1, 3, 4]
    assert found[1].error is not None and "8 MiB" in found[1].error.message


def test_a_damaged_file_or_batch_is_as_good_as_none(tmp_path: Path) -> None:
    """Also to the next start."""
    for kind in ("files", "batches"):
        (tmp_path / "state" / "documents" / kind).mkdir(parents=True)
        (tmp_path / "state" / "documents" / kind / "x.json").write_bytes(b'{"id": "x", ')
    with Server(tmp_path).wait_ready() as server:
        for kind in ("files", "batches"):
            assert server.get(f"/v1/{kind}").json()["data"] == []
            assert server.get(f"/v1/{kind}/x").status_code == 404


@pytest.mark.parametrize("torn", range(0, 30, 7))
def test_half_an_entry_is_taken_away(tmp_path: Path, torn: int) -> None:
    path = tmp_path / "journal"
    journal = Journal(path)
    assert journal.done() == {}
    journal.add(3, True, {"text": "ü"})
    whole = path.read_bytes()
    journal.add(4, False, {"text": "second"})
    path.write_bytes(path.read_bytes()[: len(whole) + torn])
    assert journal.done() == {3: True} and path.read_bytes() == whole
    journal.add(4, False, {"text": "second"})
    assert journal.done() == {3: True, 4: False}
    assert [json.loads(one) for one in journal.entries(good=False)] == [{"text": "second"}]
