"""OpenAI's Responses API: from a body to an answer, whole or streamed, and what is kept of it.

docs/http-api.md lists every field.  Event loop.
"""

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from agent_memory.errors import BadRequest, RequestError
from agent_memory.request import Conversation
from agent_memory.server import ask, body, sse
from agent_memory.server.ask import Ask
from agent_memory.server.body import Fields
from agent_memory.server.openai import refuse_not_built
from agent_memory.server.pages import page
from agent_memory.server.response_answer import Answer, Event
from agent_memory.server.response_items import Item, messages, read
from agent_memory.server.response_store import Responses
from agent_memory.server.response_tools import Offer, offered
from agent_memory.server.sse import EventStream, WhileConnected
from agent_memory.server.tools import several
from agent_memory.server.turn import Begun, Ended, Piece, Turn
from agent_memory.store.documents import response_ids_of

PATH = "/v1/responses/{response_id}"

# Fields that would change the answer, with the values that leave it as it is.
NOT_BUILT: dict[str, tuple[object, ...]] = {
    "background": (False,),
    "conversation": (),
    "prompt": (),
}
SEALED, LOGPROBS = "reasoning.encrypted_content", "message.output_text.logprobs"
INCLUDE = (
    SEALED,
    LOGPROBS,
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
    "file_search_call.results",
    "message.input_image.image_url",
    "web_search_call.action.sources",
    "web_search_call.results",
)
"""All but the first two are of what there is never anything of here."""
PLACES = {"messages": "input", "logprobs": "top_logprobs"}
"""Fields that errors name as the chat has them, and what they are called here."""


@dataclass(frozen=True, slots=True)
class ResponseRequest:
    """`ask` without its conversation, which is `items` behind that of the response `previous`."""

    ask: Ask
    instructions: str | None
    items: list[Item]
    previous: str | None
    offer: Offer
    options: dict[str, Any]
    echo: dict[str, Any]
    stream: bool
    seals: bool

    def ask_after(self, before: list[Item], items: list[Item]) -> Ask:
        """Instructions are this request's alone."""
        role = {"type": "message", "role": "system"}
        first = [{**role, "content": [{"text": self.instructions}]}] if self.instructions else []
        said = messages([*first, *before, *items])
        return replace(self.ask, prompt=Conversation(said, self.offer.given, self.options))


# ── the body ─────────────────────────────────────────────────────────────────────────────────────


def parse(values: dict[str, Any], headers: Mapping[str, str]) -> ResponseRequest:
    """Raises BadRequest naming the field."""
    fields = Fields(values)
    refuse_not_built(fields, NOT_BUILT)
    agent, priority = ask.whose(headers, values)
    include = _include(fields)
    top = fields.integer("top_logprobs", 0, ask.MAX_LOGPROBS)
    offer = offered(fields)
    echo = _echo(fields)
    return ResponseRequest(
        Ask(
            model=fields.text("model"),
            agent=agent,
            priority=priority,
            prompt=Conversation(()),
            effort=fields.below("reasoning").choice("effort", ask.EFFORTS),
            max_tokens=fields.integer("max_output_tokens", 1),
            stop=ask.stops(fields),
            sampling=ask.sampling(fields),
            logprobs=top or 0 if top or LOGPROBS in include else None,
            ignore_end=fields.flag("ignore_eos"),
            form=ask.form(fields.below("text").below("format")),
            calls=offer.calls,
        ),
        instructions=fields.text("instructions"),
        items=read(fields),
        previous=fields.text("previous_response_id"),
        offer=offer,
        options=ask.options(fields),
        echo=echo,
        stream=fields.flag("stream"),
        seals=SEALED in include,
    )


def _include(fields: Fields) -> list[str]:
    found: list[str] = fields.items("include") or []
    for n, name in enumerate(found):
        if name not in INCLUDE:
            fields.refuse(f"include[{n}]", "one of " + ", ".join(INCLUDE))
    return found


def _echo(fields: Fields) -> dict[str, Any]:
    """What of the request is in its answer."""
    reasoning, text = fields.below("reasoning"), fields.below("text")
    fields.choice("truncation", ("auto", "disabled"))
    return {
        "instructions": fields.text("instructions"),
        "max_output_tokens": fields.integer("max_output_tokens", 1),
        "max_tool_calls": fields.integer("max_tool_calls", 0),
        "metadata": {name: fields.below("metadata").get(name) for name in fields.below("metadata")},
        "parallel_tool_calls": several(fields),
        "previous_response_id": fields.text("previous_response_id"),
        "prompt_cache_key": fields.text("prompt_cache_key"),
        "reasoning": {"effort": reasoning.get("effort"), "summary": None},
        "safety_identifier": fields.text("safety_identifier"),
        "service_tier": "default",
        "store": fields.get("store") is None or fields.flag("store"),
        "temperature": fields.get("temperature"),
        "text": {
            "format": text.get("format") or {"type": "text"},
            "verbosity": text.choice("verbosity", ("low", "medium", "high")) or "medium",
        },
        "tool_choice": fields.get("tool_choice") or "auto",
        "tools": [_echoed(tool) for tool in fields.items("tools") or []],
        "top_logprobs": fields.get("top_logprobs") or 0,
        "top_p": fields.get("top_p"),
        "truncation": "disabled",
        "user": fields.text("user"),
    }


def _echoed(tool: Any) -> Any:
    """With the fields that clients' types insist on."""
    if not isinstance(tool, dict) or tool.get("type") != "function":
        return tool
    return {**tool, "parameters": tool.get("parameters"), "strict": tool.get("strict") is True}


# ── the answer ───────────────────────────────────────────────────────────────────────────────────


async def create(request: Request) -> Response:
    asked = parse(body.parse(await request.body()), request.headers)
    kept = _kept(request)
    forgotten = kept.times_forgotten(asked.ask.agent)
    said = [await kept.conversation(asked.previous), await kept.resolved(asked.items)]
    turn = Turn(request, asked.ask_after(*said), response_ids_of(asked.ask.agent))
    answering = Answering(turn, asked, kept, forgotten, said)
    if not asked.stream:
        return WhileConnected(answering.whole)
    return WhileConnected(
        EventStream(
            answering.stream(),
            answering.answer.failed,
            turn.headers,
            shaped=sse.named_event,
            end=b"",
        )
    )


class Answering:
    """`said`: the items of the conversation before, and those of this request."""

    def __init__(
        self,
        turn: Turn,
        asked: ResponseRequest,
        kept: Responses,
        forgotten: int,
        said: list[list[Item]],
    ) -> None:
        self.answer = Answer(
            turn.id, turn.model, turn.bytes_of, asked.offer, asked.echo, seals=asked.seals
        )
        self._turn = turn
        self._kept = kept
        self._forgotten = forgotten
        self._said = said

    async def stream(self) -> AsyncGenerator[bytes, None]:
        async with aclosing(self._events()) as events:
            async for event in events:
                yield sse.named_event(event)

    async def whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        response = await self.response()
        await JSONResponse(response, headers=self._turn.headers())(scope, receive, send)

    async def response(self) -> dict[str, Any]:
        """When it is over.  Raises RequestError."""
        last: Event = {}
        async with aclosing(self._events()) as events:
            async for event in events:
                last = event
        response: dict[str, Any] = last["response"]
        return response

    async def _events(self) -> AsyncGenerator[Event, None]:
        """The last one tells of a response that is kept, if it is to be."""
        answer, reason = self.answer, ""
        try:
            async with aclosing(self._turn.said()) as said:
                async for item in said:
                    match item:
                        case Begun():
                            events = answer.begin()
                        case Piece():
                            events = answer.add(item)
                        case Ended(_, reason):
                            events = answer.end(reason)
                        case _:
                            continue
                    for event in events:
                        yield event
        except RequestError as error:
            error.param = PLACES.get(error.param or "", error.param)
            raise
        last = answer.over(reason, self._turn.usage())
        if answer.stored:
            last["response"]["store"] = await self._kept.keep(
                self._turn.ask.agent, self._forgotten, last["response"], self._said
            )
        yield last


# ── what was kept ────────────────────────────────────────────────────────────────────────────────


async def retrieve(request: Request) -> Response:
    if request.query_params.get("stream", "false") != "false":
        raise BadRequest(
            "A response that was kept comes whole: 'stream' must be false or absent.",
            param="stream",
        )
    found = await _kept(request).get(request.path_params["response_id"])
    return JSONResponse(found["response"])


async def delete(request: Request) -> Response:
    response_id = request.path_params["response_id"]
    await _kept(request).delete(response_id)
    return JSONResponse({"id": response_id, "object": "response", "deleted": True})


async def input_items(request: Request) -> Response:
    """Those of the conversation before, too."""
    order = request.query_params.get("order", "desc")
    if order not in ("asc", "desc"):
        raise BadRequest("'order' must be asc or desc.", param="order")
    found = await _kept(request).get(request.path_params["response_id"])
    items = [*found["before"], *found["input"]]
    return page(request, items[::-1] if order == "desc" else items)


async def cancel(request: Request) -> Response:
    await _kept(request).get(request.path_params["response_id"])
    raise BadRequest(
        "Only a response with 'background': true can be cancelled, and this server makes none. To "
        "end one that is being answered, close its connection.",
        code="not_in_background",
    )


def _kept(request: Request) -> Responses:
    kept: Responses = request.state.responses
    return kept


ROUTES = [
    Route("/v1/responses", create, methods=["POST"]),
    Route(PATH, retrieve),
    Route(PATH, delete, methods=["DELETE"]),
    Route(f"{PATH}/input_items", input_items),
    Route(f"{PATH}/cancel", cancel, methods=["POST"]),
]
