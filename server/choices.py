"""Several answers at once, as one sequence of outputs.

Knows outputs. Knows no engine, no HTTP: closing what is iterated here closes all outputs.
"""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack, aclosing

from server.engines.base import Output

Choices = AsyncGenerator[tuple[int, Output], None]
"""Outputs, each with the number of the answer that it belongs to."""


async def merged(answers: Sequence[AsyncGenerator[Output, None]]) -> Choices:
    """The outputs of all `answers` as they come. The first failure ends them all, and is raised."""
    if len(answers) == 1:
        async with aclosing(answers[0]):
            async for output in answers[0]:
                yield 0, output
        return
    queue: asyncio.Queue[tuple[int, Output] | BaseException | None] = asyncio.Queue()

    async def pump(number: int, outputs: AsyncGenerator[Output, None]) -> None:
        try:
            async for output in outputs:
                queue.put_nowait((number, output))
        except Exception as error:
            queue.put_nowait(error)
        else:
            queue.put_nowait(None)

    async with AsyncExitStack() as stack:
        for outputs in answers:
            await stack.enter_async_context(aclosing(outputs))
        pumps = [asyncio.create_task(pump(*each)) for each in enumerate(answers)]
        stack.push_async_callback(_ended, pumps)
        num_open = len(pumps)
        while num_open:
            item = await queue.get()
            if item is None:
                num_open -= 1
            elif isinstance(item, BaseException):
                raise item
            else:
                yield item


async def _ended(tasks: Sequence[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
