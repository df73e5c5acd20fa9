"""What people do with an agent's memory, over HTTP.

Knows the paths, the bodies and the shape of the answers; what is done is the engine's.  An agent id
holds no slash, so that an agent may be called `import` or `fork`; inside its tenant stands before
it.  Event loop.
"""

import asyncio
from collections.abc import Callable
from contextlib import aclosing
from typing import Any

import structlog
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from agent_memory.engine.agent_views import AgentView, HeadView
from agent_memory.engine.archive import MEDIA_TYPE
from agent_memory.engine.engine import Engine
from agent_memory.engine.transfer import Export
from agent_memory.errors import BadRequest, EngineFailed, NotFound, Unavailable
from agent_memory.keys import Caller
from agent_memory.server import body, upload
from agent_memory.server.body import Fields
from agent_memory.server.identity import checked_name
from agent_memory.server.response_store import Responses
from agent_memory.server.sse import WhileConnected
from agent_memory.tenants import inside, outside

MAX_TOKENS = 1 << 31
PATH = "/v1/agents/{agent_id:path}"

log = structlog.get_logger(__name__)


# ── look ─────────────────────────────────────────────────────────────────────────────────────────


async def agents(request: Request) -> Response:
    data = [_entry(view) for view in _engine(request).agents.all(_tenant(request))]
    return JSONResponse({"object": "list", "data": data})


async def agent(request: Request) -> Response:
    verbs = _engine(request).agents
    view = verbs.one(_agent_id(request))
    entry = _entry(view)
    wants_text = _flag(request, "text")
    for head, shown in zip(view.heads, entry["heads"], strict=True):
        shown["turns"] = _turns(head)
        if wants_text:
            for turn, text in zip(shown["turns"], await verbs.texts(head) or [], strict=False):
                turn["prompt"], turn["answer"] = text
    return JSONResponse(entry)


def _entry(view: AgentView) -> dict[str, Any]:
    newest = view.heads[0]
    return {
        "id": outside(view.id),
        "object": "agent",
        "tokens": newest.num_tokens,
        "tiers": _tiers(newest),
        "blocks": {"own": view.own_blocks, "shared": view.shared_blocks},
        "bytes": view.nbytes,
        "bytes_written": view.bytes_written,
        "pinned": view.pinned,
        "last_used": round(view.last_used, 3),
        "heads": [_head(head) for head in view.heads],
    }


def _head(head: HeadView) -> dict[str, Any]:
    return {
        "id": head.id,
        "tokens": head.num_tokens,
        "blocks": head.num_blocks,
        "tiers": _tiers(head),
        "fingerprint": head.fingerprint.hex()[:16],
        "last_used": round(head.last_used, 3),
    }


def _tiers(head: HeadView) -> dict[str, int]:
    return {"memory": head.in_memory, "disk": head.on_disk}


def _turns(head: HeadView) -> list[dict[str, Any]]:
    return [
        {"turn": number, "start": turn.start, "prompt_end": turn.prompt_end, "end": turn.end}
        for number, turn in enumerate(head.turns, 1)
    ]


# ── change ───────────────────────────────────────────────────────────────────────────────────────


async def fork(request: Request) -> Response:
    fields = await _fields(request, "name", "head")
    name = fields.text("name") or fields.refuse("name", "the new agent's name")
    view = _engine(request).agents.fork(
        _agent_id(request), _inside(request, name, "name"), _head_id(fields)
    )
    return _created(view)


async def rewind(request: Request) -> Response:
    fields = await _fields(request, "tokens", "turn", "head")
    num_tokens, turn = fields.integer("tokens", 1, MAX_TOKENS), fields.integer("turn", 1)
    if (num_tokens is None) == (turn is None):
        fields.refuse("tokens", "given, or 'turn', and not both")
    view = _engine(request).agents.rewind(
        _agent_id(request), _head_id(fields), num_tokens=num_tokens, turn=turn
    )
    return JSONResponse(_entry(view))


async def pin(request: Request) -> Response:
    await _fields(request)
    return JSONResponse(_entry(_engine(request).agents.pin(_agent_id(request), pinned=True)))


async def unpin(request: Request) -> Response:
    await _fields(request)
    return JSONResponse(_entry(_engine(request).agents.pin(_agent_id(request), pinned=False)))


async def warm(request: Request) -> Response:
    await _fields(request)
    return JSONResponse(_entry(await _engine(request).agents.warm(_agent_id(request))))


async def remove(request: Request) -> Response:
    """The responses that it was given, too.  They may be all that is left of it."""
    agent_id = _agent_id(request)
    responses: Responses = request.state.responses
    try:
        await _engine(request).agents.remove(agent_id)
    except NotFound:
        if not await responses.forget_agent(outside(agent_id)):
            raise
    except Unavailable:  # it is forgotten: who asks again may hear that there is no such agent
        await responses.forget_agent(outside(agent_id))
        raise
    else:
        await responses.forget_agent(outside(agent_id))
    return Response(status_code=204)


# ── out and in ───────────────────────────────────────────────────────────────────────────────────


async def export(request: Request) -> Response:
    agent_id = _agent_id(request)
    return WhileConnected(Download(await _engine(request).transfer.export(agent_id), agent_id))


class Download:
    """An ASGI app that sends an export.  One that fails half way is cut off: it is not as long as
    was said, and its reader notices."""

    def __init__(self, export: Export, agent_id: str) -> None:
        self._export = export
        self._agent_id = agent_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        name = f"{outside(self._agent_id).replace(':', '_')}.agent-memory.tar"
        headers = {
            "content-type": MEDIA_TYPE,
            "content-length": str(self._export.num_bytes),
            "content-disposition": f'attachment; filename="{name}"',
        }
        raw = [(key.encode(), value.encode()) for key, value in headers.items()]
        try:
            await send({"type": "http.response.start", "status": 200, "headers": raw})
            async with aclosing(self._export.chunks()) as chunks:
                async for chunk in chunks:
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        except EngineFailed as error:
            log.error("export_failed", agent=self._agent_id, reason=error.message)
        finally:  # also of a cancelled answer, which cannot wait
            asyncio.get_running_loop().run_in_executor(None, self._export.close)


async def take_in(request: Request) -> Response:
    engine = _engine(request)
    asked = request.query_params.get("name")

    def name(own: str) -> str:
        return _inside(request, own if asked is None else asked, "name")

    agent_id = await engine.transfer.receive(request.state.upload, name)
    return _created(engine.agents.one(agent_id))


# ── what they share ──────────────────────────────────────────────────────────────────────────────


def _engine(request: Request) -> Engine:
    engine: Engine = request.state.engine
    return engine


def _tenant(request: Request) -> str | None:
    caller: Caller = request.state.caller
    return caller.tenant


def _inside(request: Request, name: str, place: str) -> str:
    """Raises BadRequest if it is no name."""
    return inside(_tenant(request), checked_name(name, place))


def _agent_id(request: Request) -> str:
    """An encoded slash in the path is part of no id, whatever it decodes to."""
    if b"%2f" in request.scope["raw_path"].lower():
        checked_name("/", "The id in the path")
    return _inside(request, request.path_params["agent_id"], "The id in the path")


def _flag(request: Request, name: str) -> bool:
    text = request.query_params.get(name, "false")
    if text not in ("true", "false"):
        raise BadRequest(f"'{name}' must be true or false.", param=name)
    return text == "true"


async def _fields(request: Request, *known: str) -> Fields:
    return body.known_fields(await request.body(), *known)


def _head_id(fields: Fields) -> str | None:
    return fields.text("head")


def _created(view: AgentView) -> Response:
    return JSONResponse(_entry(view), 201, {"Location": f"/v1/agents/{outside(view.id)}"})


def _verb(name: str, endpoint: Callable[[Request], Any]) -> Route:
    return Route(f"{PATH}/{name}", endpoint, methods=["POST"])


ROUTES = [
    Route("/v1/agents", agents),
    Route(upload.PATH, take_in, methods=["POST"]),
    Route(f"{PATH}/export", export),
    _verb("fork", fork),
    _verb("rewind", rewind),
    _verb("pin", pin),
    _verb("unpin", unpin),
    _verb("warm", warm),
    Route(PATH, agent),
    Route(PATH, remove, methods=["DELETE"]),
]
