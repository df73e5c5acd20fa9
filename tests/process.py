"""A real server in a process of its own, its log lines read as events, its answers as text."""

import json
import os
import socket
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx

from agent_memory import failpoint as failpoints
from agent_memory.ops import blas
from agent_memory.ops.process import Line, ServerProcess

START_S = 60
CHAT = "/v1/chat/completions"

PLAIN = {"timeout": 60, "verify": False}
"""There is no TLS.  To read all certificates first takes longer than most answers."""

StreamedAnswer = AbstractContextManager[httpx.Response]


class Server(ServerProcess):
    """With `folder` for its state and its log."""

    def __init__(self, folder: Path, *flags: str, port: int = 0, failpoint: str = "") -> None:
        self.state_dir = folder / "state"
        self._log = folder / "log"
        own = ["--port", str(port), "--state-dir", str(self.state_dir)]
        ours = [name for name in os.environ if name.startswith("AGENT_MEMORY_")]
        unset = {name: "" for name in ours if name != blas.GUARD}  # an empty one is not set
        super().__init__([*own, *flags], self._log, {**unset, failpoints.VARIABLE: failpoint})
        self.url = f"http://127.0.0.1:{self.port}"

    # what it says

    def log(self) -> str:
        return self._log.read_text()

    def events(self, name: str) -> list[Line]:
        return [line for line in self.lines() if line["event"] == name]

    def event(self, name: str) -> Line:
        (event,) = self.events(name)
        return event

    def wait_ready(self) -> "Server":
        self.wait_until(lambda: self.get("/readyz").status_code == 200)
        return self

    def wait_until(self, true: Callable[[], bool], timeout_s: float = START_S) -> None:
        deadline = time.monotonic() + timeout_s
        while not true():
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.05)

    def metric(self, name: str) -> float:
        """The sample whose name and labels are `name`, without our prefix; 0 if there is none."""
        lines = self.get("/metrics").text.splitlines()
        prefix = f"agent_memory_{name} "
        return next((float(x.removeprefix(prefix)) for x in lines if x.startswith(prefix)), 0.0)

    def wait_on_disk(self, agent: str, tokens: int | None = None) -> None:
        """All that it has in mind; so many tokens.  An answer is told first and remembered then."""

        def is_there() -> bool:
            view = self.get(f"/v1/agents/{agent}").json()
            if "tiers" not in view or tokens not in (None, view["tokens"]):
                return False
            return bool(view["tiers"]["disk"] == view["tokens"])

        self.wait_until(is_there)

    # what it is asked

    def call(self, method: str, path: str, **more: Any) -> httpx.Response:
        return httpx.request(method, self.url + path, **{**PLAIN, **more})

    def streamed(self, method: str, path: str, **more: Any) -> StreamedAnswer:
        return httpx.stream(method, self.url + path, **{**PLAIN, **more})

    def get(self, path: str) -> httpx.Response:
        return self.call("GET", path, timeout=10)

    def delete(self, path: str) -> httpx.Response:
        return self.call("DELETE", path, timeout=10)

    def post(self, body: object, path: str = CHAT, **headers: str) -> httpx.Response:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        headers = {"Content-Type": "application/json", **named}
        return self.call("POST", path, content=raw, headers=headers)

    def ask(self, text: str, agent: str | None = None, **fields: object) -> httpx.Response:
        return self.post(chat(text, **fields), **({"X-Agent-ID": agent} if agent else {}))

    def stream(self, text: str, agent: str = "streamer", **fields: object) -> list[str]:
        """The data of each event of a streamed answer."""
        body = chat(text, **{"stream": True, **fields})
        headers = {"X-Agent-ID": agent}
        with self.streamed("POST", CHAT, json=body, headers=headers) as answer:
            assert answer.status_code == 200, answer.read()
            return [line.removeprefix("data: ") for line in answer.iter_lines() if line]

    def connect(self) -> socket.socket:
        client = socket.create_connection(("127.0.0.1", self.port))
        client.settimeout(20)
        return client

    def connect_narrow(self) -> socket.socket:
        """Small windows and segments keep the system's own buffers small."""
        client = socket.socket()
        client.settimeout(20)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 512)
        client.connect(("127.0.0.1", self.port))
        return client

    def connect_and_stall(self, **fields: object) -> socket.socket:
        """A client that asks for an endless answer and reads nothing, not even what it asked for
        before, until more waits for it than the server likes to hold.  Events are long.
        """
        client = self.connect_narrow()
        before = b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n" * 4
        long = {"stream": True, "logprobs": True, "top_logprobs": 20}
        client.sendall(before + raw_post(chat(ENDLESS, **long, **fields)))
        self.wait_until(lambda: self.metric("stalled_connections") == 1)
        return client


def chat(text: str, **fields: object) -> dict[str, Any]:
    """A request at temperature 0 that asks `text`."""
    return {"messages": [{"role": "user", "content": text}], "temperature": 0, **fields}


def raw_post(body: dict[str, Any]) -> bytes:
    """A whole HTTP request for an answer to `body`."""
    raw = json.dumps(body).encode()
    return post_head(len(raw)) + raw


def post_head(length: int, *more: str) -> bytes:
    lines = [
        f"POST {CHAT} HTTP/1.1",
        "Host: localhost",
        "Content-Type: application/json",
        f"Content-Length: {length}",
        *more,
    ]
    return "".join(f"{line}\r\n" for line in [*lines, ""]).encode()


def read_until(client: socket.socket, end: bytes) -> bytes:
    data = b""
    while end not in data and (piece := client.recv(65536)):
        data += piece
    return data


def content(events: Iterable[str]) -> str:
    """The text of streamed chunks."""
    chunks = [json.loads(event) for event in events if event.startswith("{")]
    choices = [chunk["choices"][0] for chunk in chunks if chunk.get("choices")]
    return "".join(choice["delta"].get("content", "") for choice in choices)


ENDLESS = "Repeat this:\n" + "0" * 100
"""What the built-in model never comes to an end of, at temperature 0."""
