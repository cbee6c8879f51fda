"""A linear layer as torch computes it against one whose weights are laid out for oneDNN, by shape and rows.

As in a model, a weight has been out of the core's cache for as long as 13 MB of others were read.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import linear

from server.engines.packing import packed_linear

# (in, out): of the demo model, of SmolLM2-135M, of Llama-3-8B.
SHAPES = ((192, 192), (192, 640), (640, 192), (192, 1536), (576, 192), (576, 576), (576, 1536), (1536, 576))
LARGE = ((4096, 1024), (4096, 14336), (14336, 4096))
ROWS = (1, 2, 4, 16, 64, 256)
_BETWEEN = 3_400_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--large", action="store_true", help="the shapes of Llama-3-8B")
    arguments = parser.parse_args()
    dtype = getattr(torch, arguments.dtype)
    torch.manual_seed(0)
    _print(f"hardware  {processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads")
    _print(f"versions  torch {torch.__version__}")
    _print(f"load      {arguments.dtype}, {arguments.rounds} rounds, medians, seed 0")
    _print(f"command   python -m benchmarks.linear {' '.join(sys.argv[1:])}\n")
    _print("in, out        rows  torch, us  packed, us  ratio")
    for shape in LARGE if arguments.large else SHAPES:
        weights = _weights(shape, dtype)
        packed = [packed_linear(each, None, 1) for each in weights]
        for rows in ROWS:
            given = torch.randn(rows, shape[0], dtype=dtype)
            plain, ours = _microseconds(
                arguments.rounds,
                len(weights),
                lambda n, given=given, weights=weights: linear(given, weights[n]),
                lambda n, given=given, packed=packed: packed[n](given),
            )
            _print(
                f"{shape[0]:>5}, {shape[1]:<6}  {rows:>4}  {plain:>9.1f}  {ours:>10.1f}  {plain / ours:>5.2f}"
            )


def _weights(shape: tuple[int, int], dtype: torch.dtype) -> list[Tensor]:
    number = max(1, round(_BETWEEN / (shape[0] * shape[1])))
    return [torch.randn(shape[1], shape[0], dtype=dtype) for _ in range(number)]


def _microseconds(rounds: int, number: int, *sides: Callable[[int], object]) -> list[float]:
    """Of a call of each side: medians over rounds, in which each side in turn goes through all weights."""
    seconds: list[list[float]] = [[] for _ in sides]
    with torch.inference_mode():
        for _ in range(rounds + 1):
            for side, taken in zip(sides, seconds, strict=True):
                begun = time.perf_counter()
                for each in range(number):
                    side(each)
                taken.append((time.perf_counter() - begun) / number)
    return [statistics.median(taken[1:]) * 1e6 for taken in seconds]


def processor() -> str:
    """What /proc says of the first core."""
    lines = (
        Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        if Path("/proc/cpuinfo").exists()
        else []
    )
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown"
    )


def _print(text: str) -> None:
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()
