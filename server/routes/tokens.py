"""`POST /tokenize` and `POST /detokenize`, as vLLM has them.

Knows their fields. Knows no engine but its protocol.
"""

from typing import Any

from fastapi import APIRouter, Request

from server.body import parse_fields, read_object
from server.callers import caller_of
from server.routes.admitting import admitting
from server.routes.asking import Asking, asked_model, refuse_query
from server.routes.openapi import COUNT, COUNTS, TEXT, TEXTS, reading
from server.schemas import DetokenizeRequest, TokenizeRequest


def tokens_router(asking: Asking) -> APIRouter:
    """The routes."""
    router, engine = APIRouter(route_class=admitting(asking.gate)), asking.engine

    tokenized = {"count": COUNT, "max_model_len": COUNT, "tokens": COUNTS, "token_strs": TEXTS}

    @router.post("/tokenize", **reading(TokenizeRequest, **tokenized))
    async def tokenize(request: Request) -> dict[str, Any]:
        """The tokens of a prompt or of a conversation, as an answer would be generated from them."""
        refuse_query(request)
        body = parse_fields(TokenizeRequest, await read_object(request, asking.bounds))
        info = engine.describe()
        asked_model(body.model, asking.model, info, caller_of(request.scope))
        tokens = await engine.encode(body.to_engine())
        spelled = list(await engine.spell(tokens)) if body.return_token_strs else None
        return {
            "count": len(tokens),
            "max_model_len": info.max_model_len,
            "tokens": list(tokens),
            "token_strs": spelled,
        }

    @router.post("/detokenize", **reading(DetokenizeRequest, prompt=TEXT))
    async def detokenize(request: Request) -> dict[str, str]:
        """The text of tokens, control tokens included."""
        refuse_query(request)
        body = parse_fields(DetokenizeRequest, await read_object(request, asking.bounds))
        asked_model(body.model, asking.model, engine.describe(), caller_of(request.scope))
        return {"prompt": await engine.decode(tuple(body.tokens))}

    return router
