"""What clients do: most ask what is right, others leave, stall, run out of time or ask what is wrong.

Knows what is sent and how it must be answered. What a client leaves it has asked in earnest: the server
cannot tell it from others before.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any, Final

import openai

from benchmarks.soaking.asked import CHAT, Asked, below_floor, key_of, right
from benchmarks.soaking.clients import Client
from benchmarks.soaking.judging import error_of_stream
from benchmarks.soaking.tally import LostError
from benchmarks.wire import HOST, Raw

DEADLINE: Final = "deadline_exceeded"


async def ask_what_is_right(client: Client) -> None:
    asked = right(client.source)
    client.judge(asked, await client.insist(asked.raw(), asked.key))


async def ask_what_is_wrong(client: Client) -> None:
    await client.refused(client.source.choice(client.wrong))


async def ask_below_the_floor(client: Client) -> None:
    await client.refused(below_floor(client.source))


async def run_out_of_time(client: Client) -> None:
    asked, seconds = right(client.source), client.source.choice((0.001, 0.02, 0.1, 0.3))
    raw = asked.raw()
    raw = replace(raw, headers={**raw.headers, "X-Request-Timeout": str(seconds)})
    answer = await client.insist(raw, asked.key)
    if (answer.status, answer.code) == (408, DEADLINE):
        client.tally.faults["deadline passed before the answer"] += 1
    elif error_of_stream(answer) == DEADLINE:
        client.tally.faults["deadline passed while it streamed"] += 1
    else:
        client.judge(asked, answer)


async def leave_at_once(client: Client) -> None:
    await client.begin()
    client.connection.drop(reset=client.source.random() < 0.3)
    client.tally.faults["left at once"] += 1


async def leave_before_the_answer(client: Client) -> None:
    """Most of these wait for a place, or for the first token."""
    await client.begin()
    await asyncio.sleep(client.source.uniform(0, 0.3))
    client.connection.drop(reset=client.source.random() < 0.3)
    client.tally.faults["left while waiting or not streamed"] += 1


async def leave_a_stream(client: Client) -> None:
    await client.begin(stream=True)
    head = await client.connection.head()
    reset = client.source.random() < 0.3
    if head.status == 200:
        for _ in range(client.source.randint(0, 12)):
            if not await client.connection.chunk():
                break
        client.tally.faults["left a stream" + (", reset" if reset else "")] += 1
    client.connection.drop(reset=reset)
    if head.status not in (200, 429):
        raise LostError(f"a stream began with {head}")


async def leave_after_the_answer(client: Client) -> None:
    asked = right(client.source)
    client.judge(asked, await client.insist(asked.raw(), asked.key))
    client.connection.drop(reset=client.source.random() < 0.5)
    client.tally.faults["left after the last byte"] += 1


async def leave_half_a_body(client: Client) -> None:
    asked = right(client.source)
    raw, _ = client.named(half(asked), asked.key)
    await client.connection.send(raw.to_bytes())
    await asyncio.sleep(client.source.uniform(0, 0.1))
    client.connection.drop()
    client.tally.faults["half a body, then left"] += 1


async def stall_in_a_body(client: Client) -> None:
    asked = right(client.source)
    answer = await client.insist(half(asked), asked.key)
    if (answer.status, answer.code) != (408, "request_timeout"):
        raise LostError(f"half a body: {answer}")
    client.tally.faults["half a body, then nothing"] += 1


async def stall_in_a_head(client: Client) -> None:
    await client.connection.send(f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nX-Slow: ".encode())
    if client.source.random() < 0.5:
        client.connection.drop()
        client.tally.faults["half a head, then left"] += 1
        return
    said = await client.connection.until_closed()
    client.connection.drop()
    if said:
        raise LostError(f"half a head: {said!r}")
    client.tally.faults["half a head, then nothing"] += 1


async def speak_no_http(client: Client) -> None:
    client.connection.drop()
    await client.connection.send(b"\x16\x03\x01 HELLO\r\n\r\n")
    head = await client.connection.head()
    client.connection.drop()
    if head.status != 400:
        raise LostError(f"no HTTP: {head}")
    client.tally.faults["no HTTP"] += 1


async def cancel_with_openai(client: Client) -> None:
    """OpenAI's client, whose task is cancelled. Whether the request had left by then is not known."""
    asked, name = right(client.source), client.new_id()
    client.tally.perhaps.add(name)
    body = asked.body()
    extra = {"safety_level": body.pop("safety_level")} if "safety_level" in body else {}
    base_url = f"http://{HOST}:{client.port}/v1"
    async with openai.AsyncOpenAI(base_url=base_url, api_key=key_of(asked.key), max_retries=0) as api:
        create: Any = api.chat.completions.create if asked.path == CHAT else api.completions.create

        async def use() -> None:
            answer = await create(**body, extra_headers={"X-Request-Id": name}, extra_body=extra)
            if asked.stream:
                async for _ in answer:
                    pass

        using = asyncio.create_task(use())
        await asyncio.wait({using}, timeout=client.source.uniform(0, 0.6))
        if using.done():
            with suppress(openai.RateLimitError):
                using.result()
            return
        using.cancel()
        await asyncio.wait({using})
    client.tally.faults["cancelled, by OpenAI's client"] += 1


def half(asked: Asked) -> Raw:
    """The request with half of its body."""
    raw = asked.raw()
    return replace(raw, body=raw.body[: len(raw.body) // 2], announced=len(raw.body))


Behaviour = Callable[[Client], Awaitable[None]]

BEHAVIOURS: Final[Mapping[Behaviour, float]] = {
    ask_what_is_right: 100,
    ask_what_is_wrong: 20,
    ask_below_the_floor: 5,
    run_out_of_time: 12,
    leave_at_once: 6,
    leave_before_the_answer: 12,
    leave_a_stream: 12,
    leave_after_the_answer: 6,
    leave_half_a_body: 4,
    stall_in_a_body: 0.5,
    stall_in_a_head: 1,
    speak_no_http: 2,
    cancel_with_openai: 4,
}
