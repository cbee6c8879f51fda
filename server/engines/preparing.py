"""What is done with a prompt before it is a request, off the event loop: one of megabytes takes seconds.

Knows prompts, tokenizers and threads. Knows no model.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, TypeVar

from server.engines.base import Chat, Grammar, ParsedAnswer, Prompt
from server.engines.text import ChatText

_NUM_THREADS: Final = 2
T = TypeVar("T")


class Preparers:
    """Threads that are kept for prompts: they cannot hold up anything else.

    `encode` turns a prompt into tokens; `refuse_if_closed` raises where nothing may be begun any more.
    """

    def __init__(self, encode: Callable[[Prompt], list[int]], refuse_if_closed: Callable[[], None]) -> None:
        self._encode = encode
        self._refuse_if_closed = refuse_if_closed
        self._threads = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="prompts")
        self._encoding: dict[int, tuple[Prompt, asyncio.Future[list[int]]]] = {}

    async def run(self, work: Callable[..., T], *arguments: Any) -> T:
        """What `work` gives."""
        self._refuse_if_closed()
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, *arguments)

    async def encoded(self, prompt: Prompt) -> list[int]:
        """The prompt's tokens, computed once for all requests that ask for this same object at the same time:
        the choices of one answer."""
        if id(prompt) not in self._encoding:
            # Holding the prompt keeps its id its own.
            encoding = asyncio.ensure_future(self.run(self._encode, prompt))
            self._encoding[id(prompt)] = prompt, encoding
            encoding.add_done_callback(lambda ended: self._encoded(prompt, ended))
        return await asyncio.shield(self._encoding[id(prompt)][1])

    def _encoded(self, prompt: Prompt, ended: asyncio.Future[list[int]]) -> None:
        del self._encoding[id(prompt)]
        if not ended.cancelled():
            ended.exception()  # whoever waited for it may be gone: then asyncio must not call it forgotten

    def close(self) -> None:
        """Begin nothing any more."""
        self._threads.shutdown(wait=False)


class TokenizingEngine:
    """What the `Engine` protocol has about text alone, for engines whose tokenizer is here."""

    _text: ChatText
    _preparers: Preparers

    async def encode(self, prompt: Prompt) -> tuple[int, ...]:
        return tuple(await self._preparers.encoded(prompt))

    async def decode(self, token_ids: tuple[int, ...]) -> str:
        return await self._preparers.run(self._text.decode, token_ids)

    async def spell(self, token_ids: tuple[int, ...]) -> tuple[str, ...]:
        return tuple(await self._preparers.run(self._text.spell, token_ids))

    def parse(self, text: str, chat: Chat) -> ParsedAnswer:
        return self._text.parse(text, chat)

    def tool_grammar(self, chat: Chat, name: str | None, several: bool) -> Grammar:
        return self._text.tool_grammar(chat, name, several)

    @property
    def tool_marker(self) -> str:
        return self._text.tool_marker
