"""The gateway engine: another server generates, with one adapter a level; this one decides who gets which.

Knows an upstream's address, the mask's levels and the adapters that stand for them. Knows no model, no neuron
and no settings. What the adapters hold cannot be seen from here: only that they are there, and that no two of
them answer alike.
"""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Coroutine, Mapping
from contextlib import aclosing
from pathlib import Path
from typing import Any, Final, TypeVar
from uuid import uuid4

import httpx

from modulation.errors import MaskMismatchError, ModelError
from modulation.levels import ZERO, Threshold
from modulation.masks import Mask
from modulation.profiles import profile_of
from modulation.recorded import refuse_less_safe
from server.engines.base import (
    Chat,
    EngineHealth,
    EngineInfo,
    EngineUnavailableError,
    GenerateRequest,
    Grammar,
    Output,
    ParsedAnswer,
    Prompt,
    PromptError,
    PromptTooLongError,
    UnsupportedByEngineError,
)
from server.engines.limits import refuse_unknown_adapter
from server.engines.upstream_watch import (
    CONNECT_SECONDS,
    KEEP_ALIVE_SECONDS,
    Looks,
    Target,
    Watch,
    adapters_of,
)
from server.engines.upstream_wire import (
    CHAT,
    TOOL_CHOICE,
    Lines,
    Reading,
    about_grammar,
    as_object,
    body_of,
    chat_fields,
    error_for,
    prompt_field,
    read_calls,
    scored,
)

WATCH_SECONDS: Final = 5.0
DEFAULT_TIMEOUT_SECONDS: Final = 120.0
MAX_SPELLED: Final = 1024

_RETRY_SECONDS: Final = 5
_SPELLED_AT_ONCE: Final = 16
_DONE: Final = b"[DONE]"
T = TypeVar("T")


class UpstreamEngine:
    """An `Engine` in front of a server that speaks OpenAI's API in vLLM's dialect.

    `adapters` maps levels to the upstream's models where these are not called as the export calls them.
    `timeout_seconds` bounds the silence between two pieces of an answer. Only what could not be sent is sent
    again.

    Raises, from the constructor:
        ModelError: the upstream cannot be reached, does not list the base model and every level's adapter,
            answers for models that it does not have, or answers alike at two levels.
        MaskError: the mask cannot be read, or records a level as less safe than its name (unless
            `allow_less_safe_levels`).
    """

    def __init__(
        self,
        url: str,
        mask: Path,
        *,
        served_model_name: str,
        upstream_model: str,
        key: str | None = None,
        adapters: Mapping[str, str] | None = None,
        max_model_len: int | None = None,
        timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS,
        allow_less_safe_levels: bool = False,
        watch_seconds: float = WATCH_SECONDS,
    ) -> None:
        loaded = Mask.load(mask)
        if not allow_less_safe_levels:
            refuse_less_safe(loaded)
        models = adapters_of(upstream_model, loaded.levels.names, adapters or {})
        thresholds = {level.name: level.threshold for level in loaded.levels}
        self._target = Target(url, key, models, thresholds)
        self._timeout_seconds = timeout_seconds
        self._models: dict[Threshold, str] = {}
        for level, model in models.items():
            self._models.setdefault(thresholds[level], model)
        # Nobody can guess it, so no model's text is taken for a call.
        self._marker = f"<tool_calls {uuid4().hex}>"
        self._client: httpx.AsyncClient | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._num_running = 0
        self._is_closed = False
        self._looks = Looks(self._target)
        try:
            length = _resolved_length(self._looks.check(), max_model_len)
        except BaseException:
            self._looks.close()
            raise
        named = (f"{level}={model}" for level, model in models.items())
        self._info = EngineInfo(
            model_id=served_model_name,
            max_model_len=length,
            levels=loaded.levels,
            mask_digest=loaded.digest,
            details={"engine": f"upstream: {url}", "adapters": ", ".join(named)},
            mask=profile_of(loaded),
        )
        self._watch = Watch(self._looks.why_not_ready, watch_seconds)
        self._watch.begin()

    def describe(self) -> EngineInfo:
        return self._info

    async def use_mask(self, mask: Mask) -> EngineInfo:
        if mask.digest != self._info.mask_digest:
            raise MaskMismatchError(
                f"The upstream's adapters were made from the mask {self._info.mask_digest}, not from "
                f"{mask.digest}. Export the levels of the new mask, load them there, and start this server "
                "with it."
            )
        return self._info

    def healthy(self) -> EngineHealth:
        reason = self._why_not_ready()
        return EngineHealth(not reason, reason, self._num_running, 0)

    def tallies(self) -> None:
        return None

    async def close(self) -> None:
        self._is_closed = True
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.to_thread(self._watch.close)
        self._looks.close()
        if self._client is not None:
            await self._client.aclose()
        await asyncio.sleep(0)  # lets those end that were just cancelled

    async def encode(self, prompt: Prompt) -> tuple[int, ...]:
        if isinstance(prompt, tuple):
            prompt_field(prompt)
            return prompt
        fields = chat_fields(prompt) if isinstance(prompt, Chat) else {"prompt": prompt_field(prompt)}
        found = as_object(await self._asked("/tokenize", {"model": self._models[ZERO], **fields}))
        return tuple(int(each) for each in found["tokens"])

    async def decode(self, token_ids: tuple[int, ...]) -> str:
        body = {"model": self._models[ZERO], "tokens": list(token_ids)}
        return str(as_object(await self._asked("/detokenize", body))["prompt"])

    async def spell(self, token_ids: tuple[int, ...]) -> tuple[str, ...]:
        distinct = list(dict.fromkeys(token_ids))
        if len(distinct) > MAX_SPELLED:
            raise UnsupportedByEngineError(
                f"The text of {len(distinct)} different tokens is asked for; here, where each is asked of "
                f"another server, at most {MAX_SPELLED}.",
                "return_token_strs",
            )
        texts: dict[int, str] = {}
        for begin in range(0, len(distinct), _SPELLED_AT_ONCE):
            some = distinct[begin : begin + _SPELLED_AT_ONCE]
            texts.update(
                zip(some, await asyncio.gather(*(self.decode((each,)) for each in some)), strict=True)
            )
        return tuple(texts[each] for each in token_ids)

    def parse(self, text: str, chat: Chat) -> ParsedAnswer:  # noqa: ARG002 - the upstream has parsed it
        return ParsedAnswer(*read_calls(self._marker, text))

    @property
    def tool_marker(self) -> str:
        return self._marker

    def tool_grammar(self, chat: Chat, name: str | None, several: bool) -> Grammar:
        """What the upstream is told of calls: no grammar of ours, but the fields that ask for one."""
        names = [tool["function"]["name"] for tool in chat.tools]
        if not names or name not in (None, *names):
            raise UnsupportedByEngineError(
                f"tool_choice: there is no tool {name!r}; accepted: {', '.join(names) or 'none'}.",
                TOOL_CHOICE,
            )
        choice: Any = "required" if name is None else {"type": "function", "function": {"name": name}}
        fields = {TOOL_CHOICE: choice, **({} if several else {"parallel_tool_calls": False})}
        return Grammar("lark", json.dumps(fields), param=TOOL_CHOICE)

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Output, None]:
        self._refuse_if_not_ready()
        refuse_unknown_adapter(request.adapter, self._info.adapters)
        if request.mask_digest not in (None, self._info.mask_digest):
            raise EngineUnavailableError(f"The mask {request.mask_digest} is not in force here.")
        path, body = body_of(request, self._model_of(request.threshold))
        self._num_running += 1
        try:
            if path != CHAT and request.max_tokens is None:
                body["max_tokens"] = await self._room(request.prompt)
            if request.max_tokens == 0 and request.num_prompt_logprobs is None:
                num_prompt = self._info.max_model_len - await self._room(request.prompt)
                yield Output("", (), "length", num_prompt, 0)
                return
            if not body["stream"]:
                yield await self._scored(path, body, request)
                return
            reading = Reading(body["model"], self._marker, request.num_logprobs or 0)
            async with aclosing(self._streamed(path, body)) as datas:
                async for data in datas:
                    for output in reading.push(data):
                        yield output
            yield reading.end()
        except PromptError as error:
            raise about_grammar(error, request.grammar) from None
        finally:
            self._num_running -= 1

    def _model_of(self, threshold: Threshold) -> str:
        if threshold not in self._models:
            named = ", ".join(self._info.levels.names)
            raise UnsupportedByEngineError(
                f"({threshold.num_safety}, {threshold.num_utility}) is none of the named levels, and the "
                "engine behind this server has one adapter for each of those and none for numbers. Accepted: "
                f"{named}.",
                "safety_level",
            )
        return self._models[threshold]

    async def _room(self, prompt: Prompt) -> int:
        """How many tokens may follow a prompt. Raises PromptTooLongError where it is none."""
        length, most = len(await self.encode(prompt)), self._info.max_model_len
        if length >= most:
            raise PromptTooLongError(
                f"The prompt is {length} tokens long; with at least one token of answer it must fit the "
                f"context of {most}. Shorten it."
            )
        return most - length

    async def _scored(self, path: str, body: dict[str, Any], request: GenerateRequest) -> Output:
        text = request.prompt
        if not isinstance(text, str):
            assert isinstance(text, tuple)
            text = await self.decode(text) if request.max_tokens else ""
        return scored(await self._asked(path, body), request, text)

    async def _asked(self, path: str, body: Mapping[str, Any]) -> bytes:
        """The whole answer to one request."""
        self._refuse_if_not_ready()
        return await self._running(self._posted(path, body))

    async def _running(self, work: Coroutine[Any, Any, T]) -> T:
        """Do `work`, but not longer than the engine is open."""
        task = self._begun(work)
        try:
            await asyncio.wait({task})
        finally:
            await self._ended(task)
        if task.cancelled():
            raise self._unavailable()
        return task.result()

    async def _streamed(self, path: str, body: Mapping[str, Any]) -> AsyncGenerator[bytes, None]:
        """The data of each event. Closing this closes the connection: so the upstream learns of it."""
        queue: asyncio.Queue[bytes | None] = asyncio.Queue()
        task = self._begun(self._pumped(path, body, queue))
        task.add_done_callback(lambda _: queue.put_nowait(None))
        try:
            while (data := await queue.get()) is not None:
                yield data
            if task.cancelled():
                raise self._unavailable()
            task.result()
        finally:
            await self._ended(task)

    def _begun(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        return task

    async def _ended(self, task: asyncio.Task[Any]) -> None:
        task.cancel()
        await asyncio.wait({task})
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # whoever leaves early has no use for it

    async def _posted(self, path: str, body: Mapping[str, Any]) -> bytes:
        try:
            response = await self._open_client().post(path, json=body)
        except httpx.HTTPError as error:
            raise self._broken(error) from error
        if response.status_code != 200:
            raise self._refusal(response)
        return response.content

    async def _pumped(self, path: str, body: Mapping[str, Any], queue: asyncio.Queue[bytes | None]) -> None:
        lines = Lines()
        try:
            async with self._open_client().stream("POST", path, json=body) as response:
                if response.status_code != 200:
                    await response.aread()
                    raise self._refusal(response)
                async for received in response.aiter_bytes():
                    for data in lines.push(received):
                        if data != _DONE:
                            queue.put_nowait(data)
        except httpx.HTTPError as error:
            raise self._broken(error) from error

    def _open_client(self) -> httpx.AsyncClient:
        """One pool of connections for all requests, made on the loop that uses it."""
        if self._client is None:
            limits = httpx.Limits(max_connections=None, keepalive_expiry=KEEP_ALIVE_SECONDS)
            self._client = httpx.AsyncClient(
                base_url=self._target.url,
                headers=self._target.headers,
                timeout=httpx.Timeout(self._timeout_seconds, connect=CONNECT_SECONDS, pool=None),
                # Tries again where no connection could be made, so where nothing was sent.
                transport=httpx.AsyncHTTPTransport(retries=1, limits=limits),
            )
        return self._client

    def _refusal(self, response: httpx.Response) -> Exception:
        """The error that an answer without 200 stands for."""
        error = error_for(response.status_code, response.content, response.headers.get("retry-after"))
        if not isinstance(error, PromptError):
            logging.getLogger(__name__).warning(
                "The upstream answered %s with status %d: %.500s",
                response.url.path,
                response.status_code,
                response.text,
            )
        if response.status_code in (401, 403, 404):
            self._watch.distrust(str(error).rstrip("."))
        return error

    def _broken(self, error: httpx.HTTPError) -> EngineUnavailableError:
        """What a failure of the connection means."""
        logging.getLogger(__name__).warning("The upstream %s: %r", self._target.url, error)
        if isinstance(error, httpx.ReadTimeout | httpx.WriteTimeout):
            return EngineUnavailableError(
                f"The upstream has said nothing for {self._timeout_seconds:g} seconds.", _RETRY_SECONDS
            )
        if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
            self._watch.distrust("the upstream cannot be reached")
            return EngineUnavailableError("The upstream cannot be reached.", _RETRY_SECONDS)
        self._watch.distrust("the connection to the upstream broke")
        return EngineUnavailableError("The connection to the upstream broke.", _RETRY_SECONDS)

    def _why_not_ready(self) -> str:
        return "the engine is closed" if self._is_closed else self._watch.reason

    def _refuse_if_not_ready(self) -> None:
        if self._why_not_ready():
            raise self._unavailable()

    def _unavailable(self) -> EngineUnavailableError:
        return EngineUnavailableError(
            f"No answer can be generated: {self._why_not_ready() or 'the engine has stopped'}.",
            None if self._is_closed else _RETRY_SECONDS,
        )


def _resolved_length(told: int | None, given: int | None) -> int:
    if told is None and given is None:
        raise ModelError("The upstream does not say how long its context is: say it with --max-model-len.")
    if told is not None and given is not None and told != given:
        raise ModelError(
            f"The upstream's context is {told} tokens long, and --max-model-len says {given}: leave it out."
        )
    length = told if given is None else given
    assert length is not None
    return length
