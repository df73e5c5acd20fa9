"""What operators and clients ask first: is it alive, would it serve, with which model?

GET only, answered from memory.  Event loop.
"""

from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from agent_memory.engine.engine import Engine, Phase
from agent_memory.errors import NotFound
from agent_memory.metrics import CONTENT_TYPE, Metrics
from agent_memory.server.connections import Connections
from agent_memory.server.openai import model_entry

RETRY_AFTER_S = 5


async def root(request: Request) -> Response:
    """Some clients look here before anything else, others are people with a browser."""
    engine: Engine = request.state.engine
    return PlainTextResponse(
        f"Agent Memory serves {engine.model_id}. Clients are pointed at /v1; /openapi.json says "
        "what is there.\n"
    )


async def healthz(request: Request) -> Response:
    """200 as long as the process answers at all."""
    engine: Engine = request.state.engine
    return JSONResponse({"status": "ok", "phase": engine.phase})


async def readyz(request: Request) -> Response:
    """200 only if a chat request would be served at once."""
    engine: Engine = request.state.engine
    reason = _reason_to_wait(engine)
    if reason is None:
        return JSONResponse({"status": "ready", "model": engine.model_id})
    state = {"status": reason, "progress": engine.progress, "failure": engine.failure}
    return JSONResponse(state, 503, {"Retry-After": str(RETRY_AFTER_S)})


def _reason_to_wait(engine: Engine) -> str | None:
    if engine.phase is not Phase.READY:
        return str(engine.phase)
    return "queue_full" if engine.queue.is_full else None


async def metrics(request: Request) -> Response:
    registry: Metrics = request.state.metrics
    connections: Connections = request.state.connections
    registry.connections.set(len(connections))
    registry.connections_cut.set(connections.num_cut)
    registry.stalled_connections.set(connections.num_stalled)
    return Response(registry.text(), media_type=CONTENT_TYPE)


async def models(request: Request) -> Response:
    return JSONResponse({"object": "list", "data": [_serving(request)]})


async def model(request: Request) -> Response:
    engine: Engine = request.state.engine
    asked = request.path_params["model_id"]
    if asked != engine.model_id:
        raise unknown_model(asked, engine.model_id)
    return JSONResponse(_serving(request))


def _serving(request: Request) -> dict[str, object]:
    """Also before it is loaded; then without what only the loaded model knows."""
    engine: Engine = request.state.engine
    known = engine.model
    loaded = {"context_length": known.context_length, "kv": known.kv} if known else {}
    return model_entry(engine.model_id, {"status": str(engine.phase), **loaded})


def unknown_model(asked: str, serving: str) -> NotFound:
    return NotFound(
        f"There is no model '{asked}' here. The serving one is '{serving}'; a request without "
        "'model' takes it.",
        param="model",
        code="model_not_found",
    )
