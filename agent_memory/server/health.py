"""What an operator asks: is it alive, would it serve, which models are there, what does it count?

GET only, answered from memory.  Event loop.
"""

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from agent_memory.engine.engine import Engine, Phase
from agent_memory.engine.served import Loaded, Served
from agent_memory.metrics import CONTENT_TYPE, Metrics
from agent_memory.server.connections import Connections

RETRY_AFTER_S = 5


async def healthz(request: Request) -> Response:
    """200 as long as the process answers at all."""
    engine: Engine = request.state.engine
    return JSONResponse({"status": "ok", "phase": engine.phase})


async def readyz(request: Request) -> Response:
    """200 only if a chat request would be served at once."""
    engine: Engine = request.state.engine
    reason = _reason_to_wait(engine)
    default = engine.models.default
    of_all = {"models": {m.name: shown(m) for m in engine.models}}
    if reason is None:
        return JSONResponse({"status": "ready", "model": default.name, **of_all})
    told = {"progress": default.progress, "failure": default.failure}
    state = {"status": reason, **told, **of_all}
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


def shown(model: Served) -> dict[str, object]:
    """What changes with time, and what should worry."""
    told: dict[str, object] = {"status": str(model.phase)}
    if model.phase is Loaded.LOADING:
        told["progress"] = model.progress
    if model.failure:
        told["failure"] = model.failure
    if model.warnings:
        told["warnings"] = model.warnings
    return told
