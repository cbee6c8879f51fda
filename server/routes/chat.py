"""`POST /v1/chat/completions`: from a conversation to its answers.

Knows the fields of a chat and its kind of answer. Knows no engine but its protocol.
"""

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.answers import ChatAnswers, Tools
from server.body import parse_fields, read_object
from server.engines.base import Engine, Grammar
from server.routes.admitting import admitting
from server.routes.asking import Asking, clock, fingerprint, refuse_query
from server.routes.openapi import answering
from server.schemas import ChatCompletionRequest, NamedTool


def chat_router(asking: Asking) -> APIRouter:
    """The route."""
    router = APIRouter(route_class=admitting(asking.gate))

    @router.post("/v1/chat/completions", **answering(ChatCompletionRequest, "ChatCompletion"))
    async def create_chat_completion(request: Request) -> Response:
        """Answer a conversation at the safety level that the request asks for."""
        arrived = clock()
        refuse_query(request)
        body = parse_fields(ChatCompletionRequest, await read_object(request, asking.bounds))
        info = asking.engine.describe()
        level = asking.granted(request, body, info)
        wanted = body.to_engine(level.threshold, _tool_grammar(asking.engine, body))
        answers = ChatAnswers(
            body.model,
            fingerprint(info),
            body.num_choices,
            logprobs=bool(body.logprobs),
            tools=_tools(asking.engine, body),
        )
        return await asking.answer(request, body, wanted, answers, level, info, arrived)

    return router


def _several(body: ChatCompletionRequest) -> bool:
    return body.parallel_tool_calls is not False


def _tools(engine: Engine, body: ChatCompletionRequest) -> Tools | None:
    if not body.calls_tools:
        return None
    chat = body.chat
    return Tools(lambda text: engine.parse(text, chat), engine.tool_marker, _several(body))


def _tool_grammar(engine: Engine, body: ChatCompletionRequest) -> Grammar | None:
    """What the answer must match where a tool must be called."""
    if isinstance(body.tool_choice, NamedTool):
        return engine.tool_grammar(body.chat, body.tool_choice.function.name, False)
    if body.calls_tools and body.tool_choice == "required":
        return engine.tool_grammar(body.chat, None, _several(body))
    return None
