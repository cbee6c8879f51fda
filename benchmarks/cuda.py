"""The embedded engine on a GPU: a model of random weights in bfloat16, against what the GPU can do at all.

Model and mask are those of `benchmarks.shapes`: the mask has 2 % of all neurons, drawn at random. One engine,
whose sides take turns in shuffled order:

    off, one, mixed, distinct   the server as it is: all requests at `off`, at one threshold, at named levels,
                                or each at a threshold of its own
    no hooks                    the bare model in the same engine
    eager                       mixed, the same padded steps run and not replayed
    compiled                    mixed, in an engine of its own with the model compiled (with --compile)

A step's floor is the larger of two times: its bytes (weights, and the keys and values of all requests) over
the bandwidth of a copy, and its operations over the rate of a matrix product, both measured here. The last
line is JSON.

    python -m benchmarks.cuda --shape llama-3-8b
"""

import argparse
import asyncio
import json
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from transformers.generation.continuous_batching.utils import CudaGraphBuffer

from benchmarks.mixed_levels import ratio, without_hooks
from benchmarks.shapes import SHAPES, config_of, random_mask, random_model, write
from modulation.levels import ZERO, Threshold
from modulation.masks import Mask
from server.engines.base import GenerateRequest, Sampling
from server.engines.transformers import TransformersEngine

SIDES: Final = ("off", "one", "mixed", "distinct", "no hooks", "eager", "compiled")
RATIOS: Final = (
    *(("mixed", "off"), ("distinct", "one"), ("off", "no hooks"), ("mixed", "eager")),
    ("compiled", "mixed"),
)


def main() -> None:
    arguments = _arguments()
    folder = Path(tempfile.mkdtemp(dir=arguments.folder))
    try:
        model = random_model(config_of(arguments.shape), arguments.seed, device="cuda")
        mask = random_mask(model, arguments.seed)
        path = write(model, mask, folder)
        del model
        limits = {"gigabytes_per_second": _bandwidth(), "teraflops": _rate()}
        engines = [
            _engine(folder, path, arguments, compiled) for compiled in (False, True)[: 1 + arguments.compile]
        ]
        asyncio.run(_run(engines, mask, arguments, limits))
    finally:
        shutil.rmtree(folder)


def _engine(folder: Path, mask: Path, arguments: argparse.Namespace, compiled: bool) -> TransformersEngine:
    begun = time.perf_counter()
    engine = TransformersEngine(
        str(folder),
        mask,
        served_model_name="bench",
        device="cuda",
        max_num_seqs=max(arguments.concurrency),
        kv_cache_tokens=max(arguments.concurrency) * (arguments.prompt + arguments.tokens + 64),
        prefix_caching=False,
        compile_model=compiled,
    )
    _say(f"ready after {time.perf_counter() - begun:.1f} s{', compiled' if compiled else ''}")
    # An answer that may not end early has the length that was asked for.
    engine._manager.generation_config.eos_token_id = -1
    return engine


def _bandwidth() -> float:
    """Gigabytes a second that a large copy reads and writes."""
    source = torch.randn(2**29, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / _seconds(lambda: target.copy_(source)) / 1e9


def _rate() -> float:
    """10^12 operations a second of a large product in bfloat16."""
    one, other = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192**3 / _seconds(lambda: one @ other) / 1e12


def _seconds(call: Any) -> float:
    found = []
    for _ in range(13):
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begun.record()
        call()
        ended.record()
        ended.synchronize()
        found.append(begun.elapsed_time(ended) / 1000)
    return statistics.median(found[3:])


async def _run(
    engines: Sequence[TransformersEngine],
    mask: Mask,
    arguments: argparse.Namespace,
    limits: dict[str, float],
) -> None:
    engine, sizes = engines[0], {}
    sides = SIDES if arguments.compile else SIDES[:-1]
    for number in arguments.concurrency:
        source = random.Random(arguments.seed)
        thresholds = _thresholds(mask, number, source)
        graphs: dict[str, Any] = {}
        rounds: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
        for turn in range(-2, arguments.rounds):
            for name in source.sample(sides, len(sides)):
                asked = engines[-1] if name == "compiled" else engine
                with _side(asked, name, graphs):
                    found = await _round(asked, thresholds[name], arguments, turn)
                if turn >= 0:
                    rounds[name].append(found)
        sizes[number] = _figures(engine, number, rounds, arguments, limits)
        _tell(number, sizes[number])
    for each in engines:
        await each.close()
    setting = {
        "hardware": torch.cuda.get_device_name(),
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
        "shape": arguments.shape,
        "dtype": engine.describe().details["dtype"],
        "cuda_graphs": engine.describe().details["cuda_graphs"],
        "neurons": len(mask.safety) + len(mask.utility),
        "load": f"prompts of {arguments.prompt}, answers of {arguments.tokens}, {arguments.rounds} rounds",
        "memory_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2),
        **{name: round(value, 1) for name, value in limits.items()},
        "seed": arguments.seed,
        "command": "python -m benchmarks.cuda " + " ".join(sys.argv[1:]),
    }
    for name, value in setting.items():
        _say(f"{name:<22} {value}")
    _say(json.dumps({**setting, "sizes": sizes}))


def _tell(number: int, found: dict[str, Any]) -> None:
    _say(f"\n{number} at once; floor of a step {found['floor_ms']} ms")
    for name, side in found["sides"].items():
        _say(f"  {name:<10} {side['tokens_per_second']:>9.0f} tokens/s {side['step_ms']:>8.2f} ms a step")
    for name, each in found["ratios"].items():
        _say(f"  {name:<20} {each['median']:.3f} ({each['low']:.3f} to {each['high']:.3f})")


def _thresholds(mask: Mask, number: int, source: random.Random) -> dict[str, list[Threshold]]:
    most = mask.levels.maximum
    named = [level.threshold for level in mask.levels]
    distinct = [
        Threshold(source.randint(1, most.num_safety), source.randint(0, most.num_utility))
        for _ in range(number)
    ]
    mixed = [named[place % len(named)] for place in range(number)]
    off = [ZERO] * number
    return {
        "off": off,
        "one": [distinct[0]] * number,
        "mixed": mixed,
        "distinct": distinct,
        "no hooks": off,
        "eager": mixed,
        "compiled": mixed,
    }


@contextmanager
def _side(engine: TransformersEngine, name: str, graphs: dict[str, Any]) -> Iterator[None]:
    """Within the block the engine is as this side has it. Between rounds only: nothing is running then."""
    processor = engine._manager.batch_processor
    assert processor is not None
    runner: Any = processor.model_runner
    inputs: Any = processor.inputs_and_outputs
    kept = inputs.graphs, runner.use_cuda_graph_varlen
    bare: AbstractContextManager[None] = nullcontext()
    if name == "no hooks":
        inputs.graphs = graphs.setdefault(name, CudaGraphBuffer())
        bare = without_hooks(engine)
    if name == "eager":
        runner.use_cuda_graph_varlen = False
    try:
        with bare:
            yield
    finally:
        inputs.graphs, runner.use_cuda_graph_varlen = kept


async def _round(
    engine: TransformersEngine, thresholds: Sequence[Threshold], arguments: argparse.Namespace, turn: int
) -> tuple[float, float]:
    """Tokens a second of one batch of concurrent requests, and seconds of a step once all are running."""
    ends: list[list[float]] = []

    async def answer(which: int, threshold: Threshold) -> int:
        prompt = tuple(10 + (7 * which + 13 * place + turn) % 1000 for place in range(arguments.prompt))
        request = GenerateRequest(prompt, threshold, Sampling(temperature=0), arguments.tokens)
        ends.append(times := [])
        count = 0
        async for output in engine.generate(request):
            count += len(output.token_ids)
            times.append(time.perf_counter())
        return count

    begun = time.perf_counter()
    counts = await asyncio.gather(*(answer(*each) for each in enumerate(thresholds)))
    seconds = time.perf_counter() - begun
    assert sum(counts) == arguments.tokens * len(thresholds), counts
    times = ends[0]
    gaps = [later - earlier for earlier, later in pairwise(times[8:])]
    return sum(counts) / seconds, statistics.median(gaps)


def _figures(
    engine: TransformersEngine,
    number: int,
    rounds: dict[str, list[tuple[float, float]]],
    arguments: argparse.Namespace,
    limits: dict[str, float],
) -> dict[str, Any]:
    sides = {
        name: {
            "tokens_per_second": round(statistics.median(speed for speed, _ in each), 1),
            "step_ms": round(1000 * statistics.median(step for _, step in each), 3),
        }
        for name, each in rounds.items()
    }
    floor = _floor(engine, number, arguments.prompt + arguments.tokens / 2, limits)
    return {
        "floor_ms": round(1000 * floor, 3),
        "sides": sides,
        "ratios": {
            f"{one} / {other}": ratio([a for a, _ in rounds[one]], [b for b, _ in rounds[other]])
            for one, other in RATIOS
            if one in rounds
        },
    }


def _floor(engine: TransformersEngine, number: int, context: float, limits: dict[str, float]) -> float:
    """Seconds that a step of `number` requests needs at least, each with so many tokens before it."""
    model: Any = engine._model
    config = model.config
    embedding = model.get_input_embeddings().weight
    read = [each for each in model.parameters() if each is not embedding or config.tie_word_embeddings]
    weights = sum(each.nbytes for each in read)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kv = 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * width * context * number
    operations = 2 * number * sum(each.numel() for each in read)
    return max((weights + kv) / limits["gigabytes_per_second"] / 1e9, operations / limits["teraflops"] / 1e12)


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _arguments() -> Any:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-0.6b")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 16, 64], help="requests at once")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of each prompt")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of each answer")
    parser.add_argument("--rounds", type=int, default=10, help="counted rounds of each side, 2 or more")
    parser.add_argument("--compile", action="store_true", help="a side more: the model compiled")
    parser.add_argument("--folder", type=Path, help="where the weights are written for a while")
    parser.add_argument("--seed", type=int, default=0, help="of weights, neurons, thresholds and order")
    arguments = parser.parse_args()
    if arguments.rounds < 2:
        parser.error(f"--rounds {arguments.rounds}: at least 2 are needed for a spread")
    return arguments


if __name__ == "__main__":
    main()
