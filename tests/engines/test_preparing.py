import asyncio
import gc
import threading
from typing import Any

import pytest

from server.engines.base import Prompt, PromptError
from server.engines.preparing import Preparers

pytestmark = pytest.mark.anyio


async def test_the_choices_of_an_answer_have_their_prompt_encoded_once() -> None:
    encoded: list[Prompt] = []

    def encode(prompt: Prompt) -> list[int]:
        encoded.append(prompt)
        return [1, 2]

    preparers, prompt = Preparers(encode, lambda: None), "a prompt"
    try:
        assert await asyncio.gather(*(preparers.encoded(prompt) for _ in range(3))) == [[1, 2]] * 3
        assert encoded == [prompt]
        await preparers.encoded(prompt)
        assert encoded == [prompt, prompt]
    finally:
        preparers.close()


async def test_a_prompt_that_fails_after_everybody_has_gone_is_nobodys_error() -> None:
    told: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))
    begun, may_fail = threading.Event(), threading.Event()

    def encode(_: Prompt) -> list[int]:
        begun.set()
        may_fail.wait(30)
        raise PromptError("The prompt is empty.")

    preparers = Preparers(encode, lambda: None)
    try:
        waiting = asyncio.create_task(preparers.encoded("a prompt"))
        assert await asyncio.to_thread(begun.wait, 30)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        may_fail.set()
        while preparers._encoding:
            await asyncio.sleep(0)
        gc.collect()
        assert told == []
    finally:
        preparers.close()
