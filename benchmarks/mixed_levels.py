"""What modulation costs: throughput at mixed levels and with no hooks, against `off`, in one run.

Rounds of the three sides alternate in shuffled order on one engine in this process, so that drift of
the machine touches all alike. Every answer runs to its full length, so all sides generate the same
number of tokens.
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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import transformers

from modulation.demo import MASK_FILE, MODEL_DIR
from modulation.levels import ZERO, Threshold
from server.engines.base import Chat, GenerateRequest, Message, Sampling
from server.engines.transformers import TransformersEngine

TOPICS = ("bake bread", "mend a bicycle", "write a letter", "plan a garden", "paint a fence", "sort photos")


def main() -> None:
    arguments = _arguments()
    engine = TransformersEngine(
        str(arguments.model), arguments.mask, served_model_name="bench", max_num_seqs=arguments.concurrency
    )
    # An answer that may not end early has the length that was asked for.
    engine._manager.generation_config.eos_token_id = -1
    asyncio.run(_run(engine, arguments))


async def _run(engine: TransformersEngine, arguments: argparse.Namespace) -> None:
    maximum = engine.describe().levels.maximum
    source = random.Random(arguments.seed)
    sides: dict[str, list[Threshold]] = {
        "off": [ZERO] * arguments.concurrency,
        "mixed": [
            Threshold(source.randint(1, maximum.num_safety), source.randint(0, maximum.num_utility))
            for _ in range(arguments.concurrency)
        ],
        "no hooks": [ZERO] * arguments.concurrency,
    }
    speeds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(-arguments.warmup, arguments.rounds):
        for name in source.sample(list(sides), len(sides)):
            if name == "no hooks":
                with without_hooks(engine):
                    speed = await _round(engine, sides[name], arguments.tokens)
            else:
                speed = await _round(engine, sides[name], arguments.tokens)
            if number >= 0:
                speeds[name].append(speed)
    await engine.close()
    _report(engine, arguments, speeds)


async def _round(engine: TransformersEngine, thresholds: list[Threshold], num_tokens: int) -> float:
    """Tokens generated per second by one batch of concurrent requests."""

    async def answer(number: int, threshold: Threshold) -> int:
        text = f"How do I {TOPICS[number % len(TOPICS)]}?"
        request = GenerateRequest(
            Chat((Message("user", text),)), threshold, Sampling(temperature=0), num_tokens
        )
        return sum([len(output.token_ids) async for output in engine.generate(request)])

    start = time.perf_counter()
    counts = await asyncio.gather(*(answer(*each) for each in enumerate(thresholds)))
    assert sum(counts) == num_tokens * len(thresholds), counts
    return sum(counts) / (time.perf_counter() - start)


@contextmanager
def without_hooks(engine: TransformersEngine) -> Iterator[None]:
    """The bare model in the same engine. Safe between rounds only: nothing is running then."""
    hooked = [module for module in engine._model.modules() if module._forward_pre_hooks]
    kept = [dict(module._forward_pre_hooks) for module in hooked]
    for module in hooked:
        module._forward_pre_hooks.clear()
    try:
        yield
    finally:
        for module, hooks in zip(hooked, kept, strict=True):
            module._forward_pre_hooks.update(hooks)


def _report(
    engine: TransformersEngine, arguments: argparse.Namespace, speeds: dict[str, list[float]]
) -> None:
    details = engine.describe().details
    setting = {
        "hardware": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "device": details["device"],
        "dtype": details["dtype"],
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
        "model": os.path.relpath(arguments.model),
        "load": f"{arguments.concurrency} concurrent requests of {arguments.tokens} tokens, "
        f"{arguments.rounds} rounds a side",
        "seed": arguments.seed,
        "command": "python -m benchmarks.mixed_levels " + " ".join(sys.argv[1:]),
    }
    for name, value in setting.items():
        _print(f"{name:<10} {value}")
    _print(f"\n{'side':<10} {'tokens/s':>10} {'lowest':>10} {'highest':>10}")
    for name, values in speeds.items():
        _print(f"{name:<10} {statistics.median(values):>10.0f} {min(values):>10.0f} {max(values):>10.0f}")
    ratios = {
        "mixed_vs_off": ratio(speeds["mixed"], speeds["off"]),
        "off_vs_no_hooks": ratio(speeds["off"], speeds["no hooks"]),
        "mixed_vs_no_hooks": ratio(speeds["mixed"], speeds["no hooks"]),
    }
    _print(f"\n{'ratio':<20} {'median':>8} {'quartiles':>16}   (round by round)")
    for name, found in ratios.items():
        quartiles = f"{found['low']:.3f} to {found['high']:.3f}"
        _print(f"{name:<20} {found['median']:>8.3f} {quartiles:>16}")
    medians = {name: round(statistics.median(values), 1) for name, values in speeds.items()}
    _print(json.dumps({**setting, "tokens_per_second": medians, "ratios": ratios}))


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """Of pairs, round by round: their median and quartiles."""
    pairs = [a / b for a, b in zip(ours, theirs, strict=True)]
    low, median, high = statistics.quantiles(pairs, n=4)
    return {"median": round(median, 4), "low": round(low, 4), "high": round(high, 4)}


def _print(text: str) -> None:
    sys.stdout.write(text + "\n")


def _arguments() -> Any:
    from pathlib import Path

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL_DIR, help="a Hugging Face folder")
    parser.add_argument("--mask", type=Path, default=MASK_FILE, help="its mask file")
    parser.add_argument("--concurrency", type=int, default=16, help="requests at once")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of each answer")
    parser.add_argument("--rounds", type=int, default=30, help="counted rounds of each side, 2 or more")
    parser.add_argument("--warmup", type=int, default=2, help="rounds not counted, first")
    parser.add_argument("--seed", type=int, default=0, help="of thresholds and of the order of sides")
    arguments = parser.parse_args()
    if arguments.rounds < 2:
        parser.error(f"--rounds {arguments.rounds}: at least 2 are needed for a spread")
    return arguments


if __name__ == "__main__":
    main()
