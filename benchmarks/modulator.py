"""How to scale a few neurons of each token: the ways there are, one site at a time, interleaved in one run.

    gathered      the mask's neurons are taken out, scaled, and put into a copy: where gradients are wanted
    in place      the same, written into the activations themselves: the serving modulator's on CPU, of many
                  tokens
    dense         every neuron times a scale that is looked up by rank and the token's threshold, as in vLLM
    dense, given  the same, with the scale of all neurons made once for a step, as memory allows
    compiled ...  by torch.compile, as in a model that is compiled whole
    fused         in place by one kernel of ours, which looks at thresholds itself; on CUDA, where it serves

Each way is timed with the activation function before it, with which a compiled way is fused; `none` is
that function alone. Widths are those of the demo model, SmolLM2-135M, Qwen3-0.6B and Llama-3-8B; 1 and 16
tokens are steps that decode, 512 one that reads a prompt. Microseconds, medians; before timing, every way is
checked to give what the first gives. On CUDA calls are recorded as a graph, as a step of the server is, so it
is the GPU's time that counts. The last line is JSON.

    python -m benchmarks.modulator
"""

import argparse
import json
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn.functional import silu

from modulation.fused import scale_in_place
from modulation.modulator import _scaled

WIDTHS: Final = (640, 1536, 3072, 14336)
TOKENS: Final = (1, 16, 512)
NEURONS: Final = (8, 64, 512)
NEVER: Final = 2**30
RECORDED: Final = 50  # calls in a graph

Way = Callable[[Tensor], Tensor]


def ways(width: int, num_tokens: int, num_neurons: int, device: str, *, compiles: bool) -> dict[str, Way]:
    """By name: from a projection's output (tokens, width) to modulated activations of that shape."""
    columns = torch.randperm(width)[:num_neurons].to(device)
    ranks = torch.arange(num_neurons, dtype=torch.int32, device=device)
    factors = torch.rand(num_neurons, device=device) * 2
    limits = torch.randint(0, num_neurons + 1, (num_tokens, 1), dtype=torch.int32, device=device)
    codes = torch.full((width,), NEVER, dtype=torch.int32, device=device).index_copy(0, columns, ranks)
    table = torch.ones(width, device=device).index_copy(0, columns, factors)
    given = torch.where(codes < limits, table, 1.0)
    scale = torch.where(ranks < limits, factors, 1.0)

    def gathered(projected: Tensor) -> Tensor:
        activations = silu(projected)
        scaled = (activations.index_select(-1, columns) * scale).to(activations.dtype)
        return activations.index_copy(-1, columns, scaled)

    def in_place(projected: Tensor) -> Tensor:
        return _scaled(silu(projected), columns, scale)

    def dense(projected: Tensor) -> Tensor:
        activations = silu(projected)
        return (activations * torch.where(codes < limits, table, 1.0)).to(activations.dtype)

    def dense_given(projected: Tensor) -> Tensor:
        activations = silu(projected)
        return (activations * given).to(activations.dtype)

    found: dict[str, Way] = {
        "none": silu, "gathered": gathered, "in place": in_place, "dense": dense, "dense, given": dense_given,
    }  # fmt: skip
    if device == "cuda":
        kinds = torch.zeros(num_neurons, dtype=torch.int64, device=device)
        thresholds = torch.cat([limits, torch.zeros_like(limits)], dim=1)
        found["fused"] = lambda projected: scale_in_place(
            silu(projected), columns, kinds, ranks, factors, thresholds
        )
    if compiles:
        torch._dynamo.reset()
        found |= {
            "compiled none": torch.compile(silu, dynamic=False),
            "compiled gathered": torch.compile(gathered, dynamic=False),
            "compiled dense": torch.compile(dense, dynamic=False),
        }
    return found


def main() -> None:
    arguments = _arguments()
    torch.manual_seed(arguments.seed)
    source = random.Random(arguments.seed)
    rows = []
    names: list[str] = []
    for width in WIDTHS:
        for num_tokens in TOKENS:
            projected = torch.randn(num_tokens, width).to(arguments.device, getattr(torch, arguments.dtype))
            for num_neurons in (each for each in NEURONS if each < width):
                candidates = ways(
                    width, num_tokens, num_neurons, arguments.device, compiles=not arguments.no_compile
                )
                _check(candidates, projected)
                medians = _timed(candidates, projected, arguments.rounds, source)
                if not names:
                    names = list(medians)
                    _say(
                        f"{'width':>6}{'tokens':>7}{'neurons':>8}" + "".join(f"{each:>18}" for each in names)
                    )
                _say(
                    f"{width:>6}{num_tokens:>7}{num_neurons:>8}"
                    + "".join(f"{medians[n]:>18.1f}" for n in names)
                )
                rows.append({"width": width, "tokens": num_tokens, "neurons": num_neurons, "us": medians})
    setting = {
        "hardware": torch.cuda.get_device_name() if arguments.device == "cuda" else platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "dtype": arguments.dtype,
        "seed": arguments.seed,
        "command": "python -m benchmarks.modulator " + " ".join(sys.argv[1:]),
    }
    _say(json.dumps({**setting, "rows": rows}))


@torch.inference_mode()
def _check(candidates: dict[str, Way], projected: Tensor) -> None:
    expected = candidates["gathered"](projected)
    for name, way in candidates.items():
        if "none" not in name:
            torch.testing.assert_close(way(projected), expected, msg=f"{name!r} computes something else")
        else:
            way(projected)


@torch.inference_mode()
def _timed(
    candidates: dict[str, Way], projected: Tensor, rounds: int, source: random.Random
) -> dict[str, float]:
    """Median microseconds of a call, over rounds of some milliseconds each, in shuffled order."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    num_calls = 1
    if projected.is_cuda:
        num_calls = RECORDED
        candidates = {name: _recorded(way, projected) for name, way in candidates.items()}
    calls = {name: _calls(way, projected) for name, way in candidates.items()}
    for _ in range(rounds):
        for name in source.sample(list(candidates), len(candidates)):
            seconds[name].append(_one(candidates[name], projected, calls[name]) / calls[name] / num_calls)
    return {name: round(1e6 * statistics.median(each), 2) for name, each in seconds.items()}


def _recorded(way: Way, projected: Tensor) -> Way:
    """A graph of some calls, as one call."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        way(projected)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(RECORDED):
            given = way(projected)

    def replay(_projected: Tensor) -> Tensor:
        graph.replay()
        return given

    return replay


def _calls(way: Way, projected: Tensor) -> int:
    """How many calls take about 4 ms."""
    return max(1, round(0.004 / (_one(way, projected, 5) / 5)))


def _one(way: Way, projected: Tensor, calls: int) -> float:
    if projected.is_cuda:
        torch.cuda.synchronize()
    begun = time.perf_counter()
    for _ in range(calls):
        way(projected)
    if projected.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _arguments() -> Any:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--rounds", type=int, default=15, help="of each way and shape")
    parser.add_argument("--no-compile", action="store_true", help="leave out what needs a C++ compiler")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
