"""What operators and clients ask first: is it alive, would it serve, are its models there?

GET only, answered from memory.  Event loop.
"""

from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from agent_memory.engine.engine import Engine
from agent_memory.engine.phase import HELD, Phase, refusal
from agent_memory.engine.served import Loaded, Served
from agent_memory.keys import Caller
from agent_memory.metrics import CONTENT_TYPE, Metrics
from agent_memory.server.connections import Connections

TROUBLE_RETRY_S = 30
"""By then a supervisor has started another."""


async def root(request: Request) -> Response:
    """Some clients look here before anything else, others are people with a browser."""
    engine: Engine = request.state.engine
    return PlainTextResponse(
        f"Agent Memory serves {engine.models.default.name}. Clients are pointed at /v1; "
        "/openapi.json says what is there.\n"
    )


async def healthz(request: Request) -> Response:
    """200 as long as the event loop, which says this, and the engine thread get on.  The engine is
    not asked: it could not answer if it did not."""
    engine: Engine = request.state.engine
    trouble, heartbeat = engine.trouble, engine.heartbeat
    state = {
        "status": trouble or "ok",
        "phase": engine.phase,
        "engine": {
            "resting": heartbeat.rests,
            "last_turn_age_s": round(heartbeat.turn_age_s, 3),
            "stalled_after_s": round(heartbeat.limit_s, 1),
        },
    }
    if trouble is None:
        return JSONResponse(state)
    return JSONResponse({**state, "reason": trouble}, 503, _later(TROUBLE_RETRY_S))


async def readyz(request: Request) -> Response:
    """200 only if a chat request would be served at once."""
    engine: Engine = request.state.engine
    waits = _wait(engine, request.state.caller)
    default = engine.models.default
    of_all = {"models": {model.name: shown(model) for model in engine.models}}
    if waits is None:
        known = _trusting(request, model=default.name, **of_all)
        return JSONResponse({"status": "ready", **known})
    reason, retry_after = waits
    failure = HELD if engine.phase is Phase.HELD else default.failure
    more = _trusting(request, progress=default.progress, **of_all, failure=failure)
    return JSONResponse({"status": reason, "reason": reason, **more}, 503, _later(retry_after))


def _trusting(request: Request, **more: object) -> dict[str, object]:
    """What names models and files is for who may know."""
    return more if request.state.caller.trusted else {}


def _wait(engine: Engine, asking: Caller) -> tuple[str, int] | None:
    """Why, and for how many seconds."""
    if trouble := engine.trouble:
        return trouble, TROUBLE_RETRY_S
    if engine.phase is not Phase.READY:
        default = engine.models.default
        said = refusal(engine.phase, default.progress, default.failure)
        return said.reason, said.retry_after
    if engine.queue.is_full(asking.tenant):
        return "queue_full", engine.queue.retry_after_s
    if engine.is_short_of_memory:
        return "memory_pressure", engine.queue.retry_after_s
    return None


def _later(seconds: int) -> dict[str, str]:
    return {"Retry-After": str(seconds)}


async def metrics(request: Request) -> Response:
    registry: Metrics = request.state.metrics
    connections: Connections = request.state.connections
    engine: Engine = request.state.engine
    registry.engine_turn_age.set(0.0 if engine.heartbeat.rests else engine.heartbeat.turn_age_s)
    registry.connections.set(len(connections))
    registry.connections_cut.set(connections.num_cut)
    for reason, closed in connections.num_closed.items():
        registry.connections_closed.labels(reason).set(closed)
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
