"""What it costs to find NaN and infinity: one maximum per row of logits, against the step's own argmax."""

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable

import torch

SHAPES = ((16, 32_000), (64, 32_000), (16, 151_936), (64, 151_936))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=50)
    rounds = parser.parse_args().rounds
    torch.manual_seed(0)
    _print(f"hardware  {platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads")
    _print(f"versions  torch {torch.__version__}")
    _print(f"load      float32, {rounds} rounds, medians, seed 0")
    _print(f"command   python -m benchmarks.finite_logits {' '.join(sys.argv[1:])}\n")
    _print("requests  vocabulary  check, ms  argmax, ms")
    for rows, vocabulary in SHAPES:
        logits = torch.randn(rows, vocabulary)
        check = _milliseconds(rounds, lambda logits=logits: logits.amax(dim=-1).isfinite().tolist())
        argmax = _milliseconds(rounds, lambda logits=logits: logits.argmax(dim=-1))
        _print(f"{rows:>8}  {vocabulary:>10}  {check:>9.3f}  {argmax:>10.3f}")


def _print(text: str) -> None:
    sys.stdout.write(text + "\n")


def _milliseconds(rounds: int, work: Callable[[], object]) -> float:
    seconds = []
    for _ in range(rounds + 1):
        begun = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds[1:]) * 1000


if __name__ == "__main__":
    main()
