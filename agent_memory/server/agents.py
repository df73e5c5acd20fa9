"""What each agent has in mind: listed and looked up, from memory.  Event loop."""

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from agent_memory.engine.engine import AgentView, Engine
from agent_memory.errors import NotFound
from agent_memory.server.identity import checked_name


async def agents(request: Request) -> Response:
    engine: Engine = request.state.engine
    return JSONResponse({"object": "list", "data": [_entry(view) for view in engine.agents()]})


async def agent(request: Request) -> Response:
    engine: Engine = request.state.engine
    name = checked_name(request.path_params["agent_id"], "The id in the path")
    view = engine.agent(name)
    if view is None:
        raise NotFound(f"Nothing is remembered of an agent '{name}'.", code="agent_not_found")
    return JSONResponse({**_entry(view), "heads": view.heads})


def _entry(view: AgentView) -> dict[str, Any]:
    return {
        "id": view.id,
        "object": "agent",
        "tokens": view.num_tokens,
        "bytes": view.nbytes,
        "tiers": {"memory": view.tokens_in_memory, "disk": view.tokens_on_disk},
        "last_used": round(view.last_used, 3),
    }
