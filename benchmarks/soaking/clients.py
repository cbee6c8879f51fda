"""One client of the soak: its connection, the ids of its requests, and what it has seen.

Knows when an answer is refused rightly and when it is lost. Knows no behaviour.
"""

import asyncio
import itertools
import random
from dataclasses import replace
from typing import Final

from benchmarks.soaking.asked import GENERATING, Asked, Wrong, everything_right, right, wrong_requests
from benchmarks.soaking.judging import Names, Reference, References, judged, names_of, reference_of
from benchmarks.soaking.tally import LostError, Tally
from benchmarks.wire import Answer, Connection, Raw

UNAUTHENTICATED: Final = 401
DENIED: Final = (UNAUTHENTICATED, 403, 429)


class Client:
    """One client, with a connection of its own."""

    def __init__(self, port: int, name: str, source: random.Random, references: References) -> None:
        self.tally = Tally()
        self.source = source
        self.port = port
        self._ids = (f"{name}-{number}" for number in itertools.count())
        self._references = references
        self.wrong = wrong_requests()
        self.connection = Connection(port)

    def new_id(self) -> str:
        """The id of the next request."""
        self.tally.num_sent += 1
        return next(self._ids)

    def named(self, raw: Raw, key: str | None) -> tuple[Raw, str]:
        """`raw` with an id of its own. If it is for an answer, its line of the audit log is expected."""
        name = self.new_id()
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
        if answer.status == UNAUTHENTICATED:  # of many only some leave a line of their own
            self.tally.audited.pop(name, None)
            self.tally.perhaps.add(name)
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
