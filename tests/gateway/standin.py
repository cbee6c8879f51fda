"""A server that stands in for vLLM with adapters: OpenAI's completions on one of our engines.

Each model name is a threshold, as an adapter is. What vLLM says beyond OpenAI it says too: token numbers and
counts in every chunk, `max_model_len`, /tokenize. Everything it is asked is kept in `Standin.asked`.
"""

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from modulation.levels import Threshold
from server.engines.base import (
    Chat,
    Engine,
    EngineError,
    GenerateRequest,
    Grammar,
    Message,
    Output,
    Prompt,
    PromptTooLongError,
    Sampling,
    TokenLogprob,
)
from server.engines.fake import FakeEngine
from server.process import bind
from tests.engines.contract import until

VLLM_ONLY = ("top_k", "min_p", "repetition_penalty", "chat_template_kwargs", "return_token_ids", "cache_salt")


@dataclass
class Standin:
    """One such server. Tests set what it does wrong: `status` is answered to every request for an answer,
    with `headers`; `raw` are events that are sent instead of an answer; `health` is the status of /health."""

    engine: Engine
    models: dict[str, Threshold]
    key: str | None = None
    health: int = 200
    status: int = 200
    error: Any = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)
    raw: list[bytes] | None = None
    renames: dict[str, str] = field(default_factory=dict)
    ignores_names: bool = False
    tells_tokens: bool = True
    tells_length: bool = True
    asked: list[dict[str, Any]] = field(default_factory=list)
    num_left: int = 0
    left: asyncio.Event = field(default_factory=asyncio.Event)

    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/health", self._health),
                Route("/v1/models", self._list),
                Route("/v1/chat/completions", self._chat, methods=["POST"]),
                Route("/v1/completions", self._complete, methods=["POST"]),
                Route("/tokenize", self._tokenize, methods=["POST"]),
                Route("/detokenize", self._detokenize, methods=["POST"]),
            ]
        )

    async def _health(self, _: Request) -> Response:
        return Response(status_code=self.health)

    async def _list(self, request: Request) -> Response:
        if self.key is not None and request.headers.get("authorization") != f"Bearer {self.key}":
            return _error(401, "Unauthorized")
        length = {"max_model_len": self.engine.describe().max_model_len} if self.tells_length else {}
        return JSONResponse(
            {"object": "list", "data": [{"id": name, "object": "model", **length} for name in self.models]}
        )

    async def _tokenize(self, request: Request) -> Response:
        body = await request.json()
        try:
            tokens = await self.engine.encode(_prompt(body))
        except EngineError as error:
            return _error(400, str(error))
        return JSONResponse({"count": len(tokens), "max_model_len": 0, "tokens": list(tokens)})

    async def _detokenize(self, request: Request) -> Response:
        try:
            return JSONResponse({"prompt": await self.engine.decode(tuple((await request.json())["tokens"]))})
        except EngineError as error:
            return _error(400, str(error))

    async def _chat(self, request: Request) -> Response:
        return await self._answer(request, _chat_choice)

    async def _complete(self, request: Request) -> Response:
        return await self._answer(request, _text_choice)

    async def _answer(self, request: Request, choice: Any) -> Response:
        body = await request.json()
        self.asked.append({"path": request.url.path, "headers": dict(request.headers), **body})
        if self.key is not None and request.headers.get("authorization") != f"Bearer {self.key}":
            return _error(401, "Unauthorized")
        if self.status != 200:
            return JSONResponse(self.error, self.status, self.headers)
        if body["model"] not in self.models and not self.ignores_names:
            return _error(404, f"The model `{body['model']}` does not exist.")
        if self.raw is not None:
            return StreamingResponse(_sent(self.raw), media_type="text/event-stream")
        outputs = self.engine.generate(self._wanted(body))
        try:
            first = await anext(outputs)
        except PromptTooLongError:
            length = self.engine.describe().max_model_len
            return _error(400, f"This model's maximum context length is {length} tokens. However, you asked.")
        except EngineError as error:
            return _error(400, str(error))
        if body.get("stream"):
            return StreamingResponse(
                self._events(body, choice, first, outputs), media_type="text/event-stream"
            )
        return JSONResponse(await self._whole(body, first, outputs))

    def _wanted(self, body: Mapping[str, Any]) -> GenerateRequest:
        format_, is_chat = body.get("response_format"), "messages" in body
        logprobs = (body.get("top_logprobs") or 0) if body.get("logprobs") is True else body.get("logprobs")
        grammar = (
            Grammar("json_schema", json.dumps(format_["json_schema"]["schema"]))
            if format_ is not None
            else None
        )
        return GenerateRequest(
            _prompt(body),
            self.models.get(body["model"], Threshold(0, 0)),
            Sampling(
                temperature=body.get("temperature", 1.0),
                top_p=body.get("top_p", 1.0),
                top_k=max(0, body.get("top_k", 0)),
                min_p=body.get("min_p", 0.0),
                seed=body.get("seed"),
                repetition_penalty=body.get("repetition_penalty", 1.0),
                presence_penalty=body.get("presence_penalty", 0.0),
                frequency_penalty=body.get("frequency_penalty", 0.0),
                logit_bias=tuple((int(token), bias) for token, bias in body.get("logit_bias", {}).items()),
            ),
            max_tokens=body.get("max_tokens", None if is_chat else 16),
            grammar=grammar,
            num_logprobs=logprobs,
            num_prompt_logprobs=logprobs if body.get("echo") else None,
        )

    async def _events(self, body: Any, choice: Any, first: Output, outputs: Any) -> AsyncIterator[bytes]:
        is_whole = False
        common = {"id": "x", "model": self.renames.get(body["model"], body["model"])}
        try:
            if "messages" in body:
                begin = {"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
                yield _event({**common, "choices": [begin]})
            async with aclosing(outputs):
                last = first
                async for output in _chained(first, outputs):
                    last = output
                    said = choice(output, body)
                    if self.tells_tokens:
                        said["token_ids"] = list(output.token_ids)
                    usage = {"usage": _usage(output)} if self.tells_tokens else {}
                    yield _event({**common, "choices": [said], **usage})
            yield _event({**common, "choices": [], "usage": _usage(last)})
            yield b"data: [DONE]\n\n"
            is_whole = True
        except EngineError as error:
            yield _event({"error": {"message": str(error), "type": "InternalServerError", "code": 500}})
            yield b"data: [DONE]\n\n"
            is_whole = True
        finally:
            if not is_whole:
                self.num_left += 1
                self.left.set()
                await outputs.aclose()

    async def _whole(self, body: Any, first: Output, outputs: Any) -> dict[str, Any]:
        async with aclosing(outputs):
            parts = [output async for output in _chained(first, outputs)]
        text = "".join(each.text for each in parts)
        places = [*parts[0].prompt_logprobs, *(place for each in parts for place in each.logprobs)]
        if body.get("echo"):
            prompt = body["prompt"]
            text = (prompt if isinstance(prompt, str) else await self.engine.decode(tuple(prompt))) + text
        choice = {"index": 0, "text": text, "finish_reason": parts[-1].finish_reason, "logprobs": None}
        if body.get("logprobs") is not None:
            choice["logprobs"] = _text_logprobs(places)
        return {"model": body["model"], "choices": [choice], "usage": _usage(parts[-1])}


async def _chained(first: Output, rest: Any) -> AsyncIterator[Output]:
    yield first
    async for output in rest:
        yield output


async def _sent(events: list[bytes]) -> AsyncIterator[bytes]:
    for each in events:
        yield each


def _prompt(body: Mapping[str, Any]) -> Prompt:
    if "messages" in body:
        messages = tuple(Message(each["role"], each["content"]) for each in body["messages"])
        return Chat(messages, template_arguments=body.get("chat_template_kwargs") or {})
    prompt = body["prompt"]
    return prompt if isinstance(prompt, str) else tuple(prompt)


def _usage(output: Output) -> dict[str, Any]:
    return {"prompt_tokens": output.num_prompt_tokens, "completion_tokens": output.num_completion_tokens}


def _chat_choice(output: Output, body: Mapping[str, Any]) -> dict[str, Any]:
    said: dict[str, Any] = {"index": 0, "delta": {"content": output.text}, "logprobs": None}
    if body.get("logprobs"):
        said["logprobs"] = {
            "content": [
                {**_spelled(each.chosen), "top_logprobs": list(map(_spelled, _first_places(each)))}
                for each in output.logprobs
            ]
        }
    return {**said, "finish_reason": output.finish_reason}


def _first_places(place: TokenLogprob) -> list[Any]:
    """As vLLM cuts them: what was drawn, then the likeliest, as many as were asked for."""
    others = [each for each in place.top if each.text != place.chosen.text]
    return [place.chosen, *others][: len(place.top)]


def _spelled(candidate: Any) -> dict[str, Any]:
    return {"token": candidate.text, "logprob": candidate.logprob, "bytes": list(candidate.utf8)}


def _text_choice(output: Output, body: Mapping[str, Any]) -> dict[str, Any]:
    said: dict[str, Any] = {"index": 0, "text": output.text, "logprobs": None}
    if body.get("logprobs") is not None:
        said["logprobs"] = _text_logprobs(output.logprobs)
    return {**said, "finish_reason": output.finish_reason}


def _text_logprobs(places: Any) -> dict[str, Any]:
    def top(place: TokenLogprob) -> dict[str, float] | None:
        if place.chosen.logprob is None:
            return None
        return {each.text: each.logprob for each in (place.chosen, *place.top)}

    return {
        "tokens": [each.chosen.text for each in places],
        "token_logprobs": [each.chosen.logprob for each in places],
        "top_logprobs": [top(each) for each in places],
        "text_offset": [0] * len(places),
    }


def _event(data: Any) -> bytes:
    return b"data: " + json.dumps(data, ensure_ascii=False).encode() + b"\n\n"


def _error(status: int, message: str) -> Response:
    return JSONResponse({"error": {"message": message, "type": "BadRequestError", "code": status}}, status)


@asynccontextmanager
async def standing(standin: Standin, port: int = 0) -> AsyncIterator[str]:
    """The address where `standin` listens, in this loop."""
    listener = bind("127.0.0.1", port)
    config = uvicorn.Config(standin.app(), log_level="error", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    await until(lambda: server.started)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        await serving
        listener.close()


def main() -> None:
    """A process of its own: answers stop at their fourth token; it prints its address."""
    engine = FakeEngine(before_token=_stalling)
    thresholds = {name: Threshold(*map(int, counts.split(","))) for name, counts in _pairs(sys.argv[1:])}

    async def serve() -> None:
        async with standing(Standin(engine, thresholds)) as url:
            print(url, flush=True)  # noqa: T201
            await asyncio.Event().wait()

    asyncio.run(serve())


async def _stalling(request: GenerateRequest, index: int) -> None:
    if index == 3 and isinstance(request.prompt, Chat):
        await asyncio.Event().wait()


def _pairs(arguments: list[str]) -> Iterator[tuple[str, str]]:
    for each in arguments:
        name, _, counts = each.partition("=")
        yield name, counts


if __name__ == "__main__":
    main()
