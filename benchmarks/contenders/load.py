"""Load that is the same for every server: prompts, clients that ask in turn or at random times, measures.

Knows HTTP and OpenAI's streamed chat. Knows no server.
"""

import asyncio
import json
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Final

from transformers import PreTrainedTokenizerBase

from benchmarks.wire import Connection, Raw
from modulation.demo.topics import topics

PERCENTILES: Final = (50, 95, 99)
SHARED: Final = "You are a patient helper who answers in one short sentence and keeps to what was asked. " * 8
FILLER: Final = (
    "The weather was mild that week and nobody in the village was in a hurry to be anywhere. " * 12
)
_TOPICS: Final = tuple(topic.text for topic in topics("benign", "heldout"))


@dataclass(frozen=True)
class Load:
    """`concurrency` clients that ask `per_client` prompts each, one after the other; or, with a `rate`, so
    many in all at times drawn from a Poisson process of `rate` a second. `prompts`: short, long or shared."""

    concurrency: int
    per_client: int
    prompts: str = "short"
    rate: float | None = None

    @property
    def name(self) -> str:
        """How results call it."""
        if self.rate is not None:
            return f"{self.prompts}, {self.rate:g} a second"
        return f"{self.prompts}, {self.concurrency} at once"


@dataclass(frozen=True)
class Target:
    """Where a request goes, and what makes it this side's."""

    port: int
    model: str
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Answered:
    """One answer: seconds to its first text, seconds between texts, and the text."""

    first: float
    gaps: tuple[float, ...]
    text: str


@dataclass(frozen=True)
class Measured:
    """A round: tokens a second of all answers together, how many an answer has in the mean, and milliseconds
    by percentile."""

    tokens_per_second: float
    answer_tokens: float
    first_ms: dict[int, float]
    gap_ms: dict[int, float]


class Asker:
    """Rounds of prompts that were never asked before: each has a number of its own, so that no server answers
    from what it has kept; only what is shared on purpose is. Request n of a turn is about the same topic,
    and of the same length but for that number's digits, whoever is asked."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> None:
        self._tokenizer = tokenizer
        self._max_tokens = max_tokens
        self._number = 0

    def _messages(self, kind: str, topic: int) -> list[dict[str, str]]:
        self._number += 1
        note = f"Note {self._number:06}."
        text = f"{note} How do I {_TOPICS[topic % len(_TOPICS)]}?"
        if kind == "long":
            text = f"{note} {FILLER}{text}"
        shared = [{"role": "system", "content": SHARED}] if kind == "shared" else []
        return [*shared, {"role": "user", "content": text}]

    def _raw(self, target: Target, kind: str, topic: int) -> Raw:
        body = {
            "model": target.model,
            "messages": self._messages(kind, topic),
            "max_tokens": self._max_tokens,
            "temperature": 0,
            "stream": True,
        }
        headers = {"Content-Type": "application/json", **target.headers}
        return Raw("POST", "/v1/chat/completions", headers, json.dumps(body).encode())

    async def round(
        self, load: Load, turn: int, target: Callable[[int], Target], source: random.Random
    ) -> Measured:
        """One round of one side; `target` says where request number n goes."""
        size = load.concurrency * load.per_client
        rows = [(target(n), self._raw(target(n), load.prompts, turn * size + n)) for n in range(size)]
        begun = time.perf_counter()
        if load.rate is None:
            parts = [rows[n :: load.concurrency] for n in range(load.concurrency)]
            found = [each for part in await asyncio.gather(*map(_in_turn, parts)) for each in part]
        else:
            found = await _at_random(rows, load.rate, source)
        seconds = time.perf_counter() - begun
        num_tokens = sum(len(self._tokenizer(each.text)["input_ids"]) for each in found)
        gaps = [gap for each in found for gap in each.gaps]
        firsts = percentiles([each.first for each in found])
        return Measured(num_tokens / seconds, num_tokens / len(found), firsts, percentiles(gaps))


async def _in_turn(rows: Sequence[tuple[Target, Raw]]) -> list[Answered]:
    kept: dict[int, Connection] = {}
    answers = []
    for target, raw in rows:
        connection = kept.setdefault(target.port, Connection(target.port))
        answers.append(await _ask(connection, raw))
    for connection in kept.values():
        connection.drop()
    return answers


async def _at_random(
    rows: Sequence[tuple[Target, Raw]], rate: float, source: random.Random
) -> list[Answered]:
    async def one(target: Target, raw: Raw) -> Answered:
        connection = Connection(target.port)
        try:
            return await _ask(connection, raw)
        finally:
            connection.drop()

    tasks, due = [], time.perf_counter()
    for row in rows:
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        tasks.append(asyncio.create_task(one(*row)))
        due += source.expovariate(rate)
    return list(await asyncio.gather(*tasks))


async def _ask(connection: Connection, raw: Raw) -> Answered:
    """Raises RuntimeError for an answer that is not 200 or has no text."""
    begun, arrived = time.perf_counter(), []
    await connection.send(raw.to_bytes())
    head = await connection.head()
    if head.status != 200:
        raise RuntimeError(f"status {head.status}: {(await connection.body(head))[:500]!r}")
    while part := await connection.chunk():
        arrived.append((time.perf_counter(), part))
    texts = _texts(arrived)
    if not texts:
        raise RuntimeError(f"an answer without text: {b''.join(part for _, part in arrived)[:500]!r}")
    times = [at for at, _ in texts]
    gaps = tuple(after - before for before, after in pairwise(times))
    if head.headers.get("connection") == "close":
        connection.drop()
    return Answered(times[0] - begun, gaps, "".join(text for _, text in texts))


def _texts(arrived: Sequence[tuple[float, bytes]]) -> list[tuple[float, str]]:
    """When which text was there: an event counts when its last byte has arrived."""
    texts: list[tuple[float, str]] = []
    rest = b""
    for at, part in arrived:
        *events, rest = (rest + part).split(b"\n\n")
        text = "".join(map(_text, events))
        if text:
            texts.append((at, text))
    return texts


def _text(event: bytes) -> str:
    data = b"".join(line[5:].strip() for line in event.split(b"\n") if line.startswith(b"data:"))
    if not data or data == b"[DONE]":
        return ""
    said: dict[str, Any] = json.loads(data)
    if "error" in said:
        raise RuntimeError(f"an error in a stream: {said['error']}")
    return "".join(choice["delta"].get("content") or "" for choice in said.get("choices", ()))


def percentiles(seconds: Sequence[float]) -> dict[int, float]:
    """In milliseconds. One value is every percentile of itself."""
    if len(seconds) < 2:
        return dict.fromkeys(PERCENTILES, 1000 * sum(seconds))
    cuts = statistics.quantiles(seconds, n=100, method="inclusive")
    return {each: 1000 * cuts[each - 1] for each in PERCENTILES}
