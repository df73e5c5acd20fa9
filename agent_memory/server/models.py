"""The configured models over HTTP: which there are, and bringing them into memory and out.

A model's id may hold slashes, plain or percent-encoded; it is a configured name, never a path of
this machine.  Event loop.
"""

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from agent_memory.engine.engine import Engine
from agent_memory.engine.models import Models
from agent_memory.engine.phase import Phase
from agent_memory.engine.served import Served
from agent_memory.server import body
from agent_memory.server.health import shown
from agent_memory.server.openai import model_entry

PATH = "/v1/models/{model_id:path}"


async def models(request: Request) -> Response:
    data = [_entry(request, served) for served in _models(request)]
    return JSONResponse({"object": "list", "data": data})


async def model(request: Request) -> Response:
    return JSONResponse(_entry(request, _models(request).find(_id(request))))


async def load(request: Request) -> Response:
    body.known_fields(await request.body())
    return JSONResponse(_entry(request, await _models(request).load(_id(request))))


async def unload(request: Request) -> Response:
    body.known_fields(await request.body())
    return JSONResponse(_entry(request, await _models(request).unload(_id(request))))


def _entry(request: Request, served: Served) -> dict[str, object]:
    """Also before it is loaded; then without what only the loaded model knows."""
    told = {**shown(served), "default": served is _models(request).default}
    told["pinned"] = served.source.pinned
    if _engine(request).phase in (Phase.DRAINING, Phase.STOPPED):
        told["status"] = str(_engine(request).phase)
    if info := served.info:
        told["context_length"] = info.context_length
        told["model_context_length"] = info.made_for
        told["kv"] = info.kv
    return model_entry(served.name, told)


def _engine(request: Request) -> Engine:
    engine: Engine = request.state.engine
    return engine


def _models(request: Request) -> Models:
    return _engine(request).models


def _id(request: Request) -> str:
    model_id: str = request.path_params["model_id"]
    return model_id


ROUTES = [
    Route("/v1/models", models),
    Route(PATH, model),
]
CHANGES = [
    Route(f"{PATH}/load", load, methods=["POST"]),
    Route(f"{PATH}/unload", unload, methods=["POST"]),
]
