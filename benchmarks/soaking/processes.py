"""The clients of one process, each doing one thing after another, and what they tell the soak meanwhile.

Knows how long, how often and how many. Knows no request.
"""

import asyncio
import multiprocessing.queues
import random
import time
from dataclasses import dataclass
from typing import Final

import openai

from benchmarks.soaking.behaviours import BEHAVIOURS
from benchmarks.soaking.clients import Client
from benchmarks.soaking.judging import References
from benchmarks.soaking.tally import LostError, Tally

PATIENCE_SECONDS: Final = 90.0
REPORT_SECONDS: Final = 5.0


@dataclass(frozen=True)
class Share:
    """What one process does. `name` also seeds what its clients do."""

    port: int
    num_clients: int
    seconds: float
    pause_seconds: float
    name: str


def run_clients(share: Share, references: References, seen: "multiprocessing.queues.Queue[Tally]") -> None:
    """The work of one process; what its clients have seen goes into `seen`, bit by bit."""
    asyncio.run(_run(share, references, seen))


async def _run(share: Share, references: References, seen: "multiprocessing.queues.Queue[Tally]") -> None:
    ends = time.monotonic() + share.seconds
    names = [f"{share.name}.{number}" for number in range(share.num_clients)]
    clients = [Client(share.port, name, random.Random(name), references) for name in names]

    def report() -> None:
        total = Tally()
        for client in clients:
            total += client.tally
            client.tally = Tally()
        seen.put(total)

    living = asyncio.gather(*(_live(client, ends, share.pause_seconds) for client in clients))
    while not living.done():
        await asyncio.wait({living}, timeout=REPORT_SECONDS)
        report()
    await living


async def _live(client: Client, ends: float, pause_seconds: float) -> None:
    ways, weights = zip(*BEHAVIOURS.items(), strict=True)
    while time.monotonic() < ends:
        (way,) = client.source.choices(ways, weights)
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                await way(client)
        except (LostError, OSError, EOFError, ValueError, LookupError, openai.OpenAIError) as error:
            said = str(error) if isinstance(error, LostError) else repr(error)
            client.tally.lost.append(f"{time.strftime('%X')} {way.__name__}: {said}")
            client.connection.drop()
        await asyncio.sleep(pause_seconds * client.source.uniform(0, 2))
    client.connection.drop()
