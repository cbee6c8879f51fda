"""The clients of one process: most ask what is right, others leave, stall, run out of time or ask what is
wrong.

Knows behaviours and how often each comes. What a client leaves it has asked in earnest: the server cannot
tell it from others before.
"""

import asyncio
import itertools
import multiprocessing.queues
import random
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any, Final

import openai

from benchmarks.soaking.asked import (
    CHAT,
    GENERATING,
    Asked,
    Wrong,
    below_floor,
    everything_right,
    key_of,
    right,
    wrong_requests,
)
from benchmarks.soaking.judging import (
    Names,
    Reference,
    References,
    error_of_stream,
    judged,
    names_of,
    reference_of,
)
from benchmarks.soaking.tally import LostError, Tally
from benchmarks.wire import HOST, Answer, Connection, Raw

PATIENCE_SECONDS: Final = 90.0
REPORT_SECONDS: Final = 5.0
DENIED: Final = (401, 403, 429)
DEADLINE: Final = "deadline_exceeded"


class Client:
    """One client, with a connection of its own."""

    def __init__(self, port: int, name: str, source: random.Random, references: References) -> None:
        self.tally = Tally()
        self.source = source
        self._port = port
        self._ids = (f"{name}-{number}" for number in itertools.count())
        self._references = references
        self._wrong = wrong_requests()
        self.connection = Connection(port)

    async def live(self, ends: float, pause: float) -> None:
        """Behave, in one way after another, until `ends`."""
        ways, weights = zip(*BEHAVIOURS.items(), strict=True)
        while time.monotonic() < ends:
            (way,) = self.source.choices(ways, weights)
            try:
                async with asyncio.timeout(PATIENCE_SECONDS):
                    await way(self)
            except (LostError, OSError, EOFError, ValueError, LookupError, openai.OpenAIError) as error:
                said = str(error) if isinstance(error, LostError) else repr(error)
                self.tally.lost.append(f"{time.strftime('%X')} {way.__name__}: {said}")
                self.connection.drop()
            await asyncio.sleep(pause * self.source.uniform(0, 2))
        self.connection.drop()

    def named(self, raw: Raw, key: str | None) -> tuple[Raw, str]:
        """`raw` with an id of its own. If it is for an answer, its line of the audit log is expected."""
        name = next(self._ids)
        self.tally.num_sent += 1
        if raw.path in GENERATING:
            self.tally.audited[name] = (key, None)
        return replace(raw, headers={**raw.headers, "X-Request-Id": name}), name

    async def ask(self, raw: Raw, key: str | None) -> Answer:
        """Ask once, and see whether a 429 is as it should be."""
        raw, name = self.named(raw, key)
        answer = await self.connection.ask(raw)
        self.tally.statuses[answer.status] += 1
        if raw.announced is not None or answer.status == 413:
            self.connection.drop()  # what comes next would be read as the rest of the body
        if raw.path in GENERATING or answer.status in DENIED:
            self.tally.audited[name] = (key, answer.status)
        if answer.head.headers.get("x-request-id") != name:
            raise LostError(f"request id {answer.head.headers.get('x-request-id')} for {name}")
        if answer.status == 429 and not (
            answer.code == "server_overloaded" and answer.head.headers["retry-after"].isdecimal()
        ):
            raise LostError(f"a 429 of another kind: {answer}")
        return answer

    async def insist(self, raw: Raw, key: str | None) -> Answer:
        """Ask until there is a place."""
        while (answer := await self.ask(raw, key)).status == 429:
            await asyncio.sleep(self.source.uniform(0.1, 0.5))
        return answer

    async def begin(self, *, stream: bool | None = None) -> Asked:
        """Send a right request, of which nothing is known of how it ends."""
        asked = right(self.source)
        asked = asked if stream is None else replace(asked, stream=stream)
        raw, _ = self.named(asked.raw(), asked.key)
        await self.connection.send(raw.to_bytes())
        return asked

    async def refused(self, wrong: Wrong) -> None:
        answer = await self.insist(wrong.raw, wrong.key)
        self.tally.faults[wrong.kind] += 1
        if (answer.status, answer.code) != (wrong.status, wrong.code):
            raise LostError(f"{wrong.kind}: {answer.status} {answer.code}, not {wrong.status} {wrong.code}")

    def judge(self, asked: Asked, answer: Answer) -> None:
        num_tokens, deviation = judged(asked, answer, self._references)
        self.tally.num_tokens += num_tokens
        self.tally.deviation = max(self.tally.deviation, deviation)
        self.tally.answered[asked.kind] += 1


async def references_alone(client: Client) -> dict[Names, Reference]:
    """What later answers are held to, asked for one at a time; the mask must stay meanwhile."""
    found = {}
    for asked in everything_right():
        answer = await client.ask(asked.raw(), asked.key)
        found[names_of(asked, answer)] = reference_of(asked, answer)
    return found


async def ask_what_is_right(client: Client) -> None:
    asked = right(client.source)
    client.judge(asked, await client.insist(asked.raw(), asked.key))


async def ask_what_is_wrong(client: Client) -> None:
    await client.refused(client.source.choice(client._wrong))


async def ask_below_the_floor(client: Client) -> None:
    await client.refused(below_floor(client.source))


async def run_out_of_time(client: Client) -> None:
    asked, seconds = right(client.source), client.source.choice((0.001, 0.02, 0.1, 0.3))
    raw = asked.raw()
    raw = replace(raw, headers={**raw.headers, "X-Request-Timeout": str(seconds)})
    answer = await client.insist(raw, asked.key)
    if (answer.status, answer.code) == (504, DEADLINE):
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
    await client.connection.send(f"POST {CHAT} HTTP/1.1\r\nHost: soak\r\nX-Slow: ".encode())
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
    asked, name = right(client.source), next(client._ids)
    client.tally.perhaps.add(name)
    client.tally.num_sent += 1
    body = asked.body()
    extra = {"safety_level": body.pop("safety_level")} if "safety_level" in body else {}
    base_url = f"http://{HOST}:{client._port}/v1"
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

BEHAVIOURS: Final[Mapping[Any, float]] = {
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


def run_clients(
    port: int,
    num_clients: int,
    seconds: float,
    pause: float,
    name: str,
    references: References,
    queue: "multiprocessing.queues.Queue[Tally]",
) -> None:
    """The work of one process: clients for so many seconds; what they have seen goes into `queue`."""
    asyncio.run(_run(port, num_clients, seconds, pause, name, references, queue))


async def _run(
    port: int,
    num_clients: int,
    seconds: float,
    pause: float,
    name: str,
    references: References,
    queue: "multiprocessing.queues.Queue[Tally]",
) -> None:
    ends = time.monotonic() + seconds
    clients = [
        Client(port, f"{name}.{number}", random.Random(f"{name}.{number}"), references)
        for number in range(num_clients)
    ]

    def report() -> None:
        total = Tally()
        for client in clients:
            total += client.tally
            client.tally = Tally()
        queue.put(total)

    living = asyncio.gather(*(client.live(ends, pause) for client in clients))
    while not living.done():
        await asyncio.wait({living}, timeout=REPORT_SECONDS)
        if not living.done():
            report()
    await living
    report()
