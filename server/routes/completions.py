"""`POST /v1/completions`: prompts that are taken as they stand, text or tokens, and what follows them.

Knows the fields of a completion and its kind of answer. Knows no engine but its protocol.
"""

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.answers import CompletionAnswers
from server.body import parse_fields, read_object
from server.engines.base import Engine
from server.routes.admitting import admitting
from server.routes.asking import Asking, clock, fingerprint, refuse_query
from server.routes.openapi import answering
from server.schemas import CompletionRequest


def completions_router(asking: Asking) -> APIRouter:
    """The route."""
    router = APIRouter(route_class=admitting(asking.gate))

    @router.post("/v1/completions", **answering(CompletionRequest, "Completion"))
    async def create_completion(request: Request) -> Response:
        """Go on with one or more prompts at the safety level that the request asks for."""
        arrived = clock()
        refuse_query(request)
        body = parse_fields(CompletionRequest, await read_object(request, asking.bounds))
        info = asking.engine.describe()
        level = asking.granted(request, body, info)
        wanted = body.to_engine(level.threshold)
        answers = CompletionAnswers(
            body.model,
            fingerprint(info),
            body.num_choices,
            len(wanted),
            logprobs=body.logprobs is not None,
            echoes=await _echoes(asking.engine, body) if body.echo else None,
        )
        return await asking.answer(request, body, wanted, answers, level, info, arrived)

    return router


async def _echoes(engine: Engine, body: CompletionRequest) -> list[str]:
    """Each choice's prompt as text."""
    texts = [each if isinstance(each, str) else await engine.decode(each) for each in body.prompts]
    return [text for text in texts for _ in range(body.num_choices)]
