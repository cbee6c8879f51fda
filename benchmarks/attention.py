"""Attention by request against one matrix of all tokens by all keys: throughput of the engine, on CPU.

Two engines of the demo model in this process, at `off`, without shared prefixes; rounds of the two alternate
in shuffled order. torch has one thread: with more, two engines would slow each other. Every answer runs to
its full length. The last line is JSON.
"""

import argparse
import asyncio
import json
import os
import platform
import random
import statistics
import sys
import time
from unittest.mock import patch

import torch

from modulation.demo import MASK_FILE, MODEL_DIR
from modulation.levels import ZERO
from server.engines import batching
from server.engines.base import GenerateRequest, Sampling
from server.engines.transformers import TransformersEngine

SIZES = ((8, 40), (32, 40), (16, 300), (32, 300))  # requests at once, tokens of a prompt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=1, help="Rounds that are not counted.")
    parser.add_argument("--tokens", type=int, default=48, help="Of each answer.")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = {f"{number} x {length}": asyncio.run(_run(number, length, arguments)) for number, length in SIZES}
    hardware = f"{platform.machine()}, {os.cpu_count()} cores, 1 thread"
    for size, figures in found.items():
        medians = f"by request {figures['by request']:6.0f}  one matrix {figures['one matrix']:6.0f} tokens/s"
        ratio = f"ratio {figures['ratio']:.3f} ({figures['low']:.3f} to {figures['high']:.3f})"
        sys.stdout.write(f"{size:>9}  {medians}  {ratio}\n")
    sys.stdout.write(json.dumps({"hardware": hardware, "command": " ".join(sys.argv), "sizes": found}) + "\n")


async def _run(number: int, length: int, arguments: argparse.Namespace) -> dict[str, float]:
    source = random.Random(arguments.seed)
    engines = {"by request": _engine(number, length + arguments.tokens)}
    with patch.object(batching, "can_attend_by_request", lambda _: False):
        engines["one matrix"] = _engine(number, length + arguments.tokens)
    speeds: dict[str, list[float]] = {name: [] for name in engines}
    for turn in range(-arguments.warmup, arguments.rounds):
        for name in source.sample(list(engines), len(engines)):
            speed = await _round(engines[name], number, length, arguments.tokens)
            if turn >= 0:
                speeds[name].append(speed)
    for engine in engines.values():
        await engine.close()
    ratios = [a / b for a, b in zip(*speeds.values(), strict=True)]
    medians = {name: statistics.median(each) for name, each in speeds.items()}
    return medians | {"ratio": statistics.median(ratios), "low": min(ratios), "high": max(ratios)}


def _engine(number: int, length: int) -> TransformersEngine:
    engine = TransformersEngine(
        str(MODEL_DIR),
        MASK_FILE,
        served_model_name="bench",
        max_num_seqs=number,
        kv_cache_tokens=number * (length + 64),
        prefix_caching=False,
    )
    # An answer that may not end early has the length that was asked for.
    engine._manager.generation_config.eos_token_id = -1
    return engine


async def _round(engine: TransformersEngine, number: int, length: int, num_tokens: int) -> float:
    """Tokens generated per second by one batch of concurrent requests."""

    async def answer(which: int) -> int:
        prompt = tuple(10 + (7 * which + 13 * place) % 1000 for place in range(length))
        request = GenerateRequest(prompt, ZERO, Sampling(temperature=0), num_tokens)
        return sum([len(output.token_ids) async for output in engine.generate(request)])

    begun = time.perf_counter()
    counts = await asyncio.gather(*map(answer, range(number)))
    assert sum(counts) == num_tokens * number, counts
    return sum(counts) / (time.perf_counter() - begun)


if __name__ == "__main__":
    main()
