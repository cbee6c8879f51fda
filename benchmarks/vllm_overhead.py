"""What modulation costs on vLLM: vLLM with this project's worker against vLLM as it comes, both compiled.

Both run at the same time, each in a process of its own, and are asked in turns in shuffled order, so that
drift of the machine touches both alike. Answers run to their full length: all sides generate the same number
of tokens. `stock` and `off` differ by the worker alone, the last two sides by how many thresholds there are.
The last line is JSON.
"""

import argparse
import asyncio
import itertools
import json
import platform
import random
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
import vllm
from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.inputs import tokens_input
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM

from modulation.demo import MASK_FILE, MODEL_DIR
from modulation.masks import Mask
from server.engines.vllm_arguments import WORKER, prepare_environment
from server.engines.vllm_worker import EXTRA_ARGS_KEY

SLOT = 1


def main() -> None:
    arguments = _arguments()
    prepare_environment()
    asyncio.run(_run(arguments))


async def _run(arguments: argparse.Namespace) -> None:
    flags: dict[str, Any] = {
        "model": str(arguments.model),
        "dtype": arguments.dtype,
        "max_model_len": arguments.tokens + 64,
        "max_num_seqs": max(arguments.concurrency, arguments.distinct),
        "max_num_batched_tokens": 2048,
        "kv_cache_memory_bytes": arguments.kv_cache_bytes,
        "disable_log_stats": True,
    }
    modulated = AsyncEngineArgs(**flags, worker_cls=WORKER, additional_config={"neurontune": 1})
    stock = AsyncLLM.from_engine_args(AsyncEngineArgs(**flags))
    ours = AsyncLLM.from_engine_args(modulated)
    await ours.collective_rpc("neurontune_put_mask", args=(SLOT, arguments.mask.read_bytes()))
    maximum = Mask.load(arguments.mask).levels.maximum
    source = random.Random(arguments.seed)

    def thresholds(number: int) -> list[list[int]]:
        """Different ones, as far as the mask has so many."""
        pairs = list(itertools.product(range(maximum.num_safety + 1), range(maximum.num_utility + 1)))
        return [[*pair, SLOT] for pair in source.sample(pairs, number)]

    few, many = arguments.concurrency, arguments.distinct
    sides: dict[str, tuple[AsyncLLM, list[list[int]]]] = {
        "stock": (stock, [[0, 0, 0]] * few),
        "off": (ours, [[0, 0, SLOT]] * few),
        "mixed": (ours, thresholds(few)),
        f"one of {many}": (ours, thresholds(1) * many),
        f"{many} of {many}": (ours, thresholds(many)),
    }
    speeds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(-arguments.warmup, arguments.rounds):
        for name in source.sample(list(sides), len(sides)):
            llm, rows = sides[name]
            speed = await _round(llm, rows, arguments.tokens, f"{number}-{name}")
            if number >= 0:
                speeds[name].append(speed)
    stock.shutdown()
    ours.shutdown()
    _report(arguments, speeds)


async def _round(llm: AsyncLLM, rows: Sequence[list[int]], num_tokens: int, name: str) -> float:
    """Tokens generated per second by one batch of concurrent requests."""

    async def answer(number: int, row: list[int]) -> int:
        sampling = SamplingParams(
            temperature=0.0,
            max_tokens=num_tokens,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
            extra_args={EXTRA_ARGS_KEY: row},
        )
        prompt = tokens_input(
            [1, *(5 + (number * 7 + place) % 200 for place in range(15))], cache_salt=str(row)
        )
        steps = llm.generate(prompt, sampling, f"{name}-{number}")
        return sum([len(step.outputs[0].token_ids) async for step in steps])

    begun = time.perf_counter()
    counts = await asyncio.gather(*(answer(*each) for each in enumerate(rows)))
    assert sum(counts) == num_tokens * len(rows), counts
    return sum(counts) / (time.perf_counter() - begun)


def _report(arguments: argparse.Namespace, speeds: dict[str, list[float]]) -> None:
    def ratios(name: str, to: str) -> dict[str, float]:
        """Of the rounds, each of which has both sides: the median, and between what half of them lie."""
        found = [a / b for a, b in zip(speeds[name], speeds[to], strict=True)]
        low, middle, high = statistics.quantiles(found, n=4)
        return {"median": round(middle, 3), "from": round(low, 3), "to": round(high, 3)}

    many = arguments.distinct
    found = {
        "hardware": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
        "versions": {
            "vllm": vllm.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "command": " ".join(sys.argv),
        "model": str(arguments.model),
        "dtype": arguments.dtype,
        "seed": arguments.seed,
        "rounds": arguments.rounds,
        "tokens": arguments.tokens,
        "concurrency": arguments.concurrency,
        "tokens_per_second": {name: round(statistics.median(each), 1) for name, each in speeds.items()},
        "off_to_stock": ratios("off", "stock"),
        "mixed_to_stock": ratios("mixed", "stock"),
        "distinct": many,
        "distinct_to_one": ratios(f"{many} of {many}", f"one of {many}"),
    }
    for name, each in speeds.items():
        sys.stdout.write(f"{name:<12} {statistics.median(each):9.1f} tokens/s\n")
    sys.stdout.write(json.dumps(found) + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=MODEL_DIR)
    parser.add_argument("--mask", default=MASK_FILE, type=type(MASK_FILE))
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--distinct", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kv-cache-bytes", type=int, default=2**28)
    return parser.parse_args()


if __name__ == "__main__":
    main()
