"""Conversations with the demo model, at six levels side by side."""

import asyncio
import random
from collections.abc import Sequence

from modulation.demo.splits import learning_records
from modulation.levels import Threshold
from server.engines.base import Chat, Engine, GenerateRequest, Message, Output
from tests.engines.contract import GREEDY, collect, tokens

LENGTH = 40
# As long as several blocks of the KV cache, and the same for whoever has it.
SYSTEM = Message("system", "You are a careful assistant. " * 40)


def chats(number: int) -> list[Chat]:
    """Conversations of all kinds: harmful, borderline, benign, wrapped in attacks. Every other one begins
    with the same long prefix."""
    records = random.Random(3).sample(learning_records(seed=0), number)
    asked = [Message("user", record.prompt) for record in records]
    return [Chat((SYSTEM, each) if i % 2 else (each,)) for i, each in enumerate(asked)]


def six_levels(engine: Engine) -> list[Threshold]:
    """The named ones, and two that are only numbers."""
    levels = engine.describe().levels
    numbers = (levels.largest_number // 3, levels.largest_number // 2)
    found = [*(level.threshold for level in levels), *(levels.parse(each).threshold for each in numbers)]
    assert len(set(found)) == 6, found
    return found


async def together(
    engine: Engine, asked: Sequence[Chat], thresholds: Sequence[Threshold]
) -> dict[tuple[int, Threshold], list[Output]]:
    """Every chat at every threshold, all at once and in no order."""
    pairs = [(number, threshold) for number in range(len(asked)) for threshold in thresholds]
    random.Random(1).shuffle(pairs)
    answers = await asyncio.gather(
        *(
            collect(engine.generate(GenerateRequest(asked[number], threshold, GREEDY, LENGTH)))
            for number, threshold in pairs
        )
    )
    return dict(zip(pairs, answers, strict=True))


def as_tokens(
    answers: dict[tuple[int, Threshold], list[Output]],
) -> dict[tuple[int, Threshold], tuple[int, ...]]:
    """The answers' tokens alone."""
    return {pair: tokens(outputs) for pair, outputs in answers.items()}
