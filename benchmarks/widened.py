"""What modulating a forward pass takes on CPU: the mask's neurons taken out of each layer's activations and
put back, or all of a layer's multiplied, by factors made once for the pass. Both ways in turns, in one run.

Of the pass only what modulation does is timed: thresholds, then each site's activations. Medians.

    python -m benchmarks.widened
"""

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any, Final
from unittest import mock

import torch
from torch import Tensor
from transformers import PreTrainedModel

import modulation.modulator
from benchmarks.linear import processor
from benchmarks.shapes import config_of, random_mask, random_model
from modulation.demo import MASK_FILE, MODEL_DIR
from modulation.loading import load_model
from modulation.masks import Mask
from modulation.modulator import Modulator

TOKENS: Final = (1, 4, 16, 32, 64, 128)
WAYS: Final = {"taken out": 0, "all": 1 << 62}  # how many factors of a site may be made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    _print(f"hardware  {processor()}, {os.cpu_count()} cores, {arguments.threads} threads")
    _print(f"versions  torch {torch.__version__}")
    _print(f"load      float32, {arguments.rounds} rounds, seed 0")
    _print(f"command   python -m benchmarks.widened {' '.join(sys.argv[1:])}\n")
    _print("model         tokens  factors a site  taken out, us  all, us  ratio")
    shape = "smollm2-135m"
    large = random_model(config_of(shape), 0, dtype=torch.float32)
    demo = load_model(str(MODEL_DIR), device="cpu", dtype="float32")
    rows = _measure("demo", demo, Mask.load(Path(MASK_FILE)), arguments.rounds)
    rows += _measure(shape, large, random_mask(large, 0), arguments.rounds)
    _print(json.dumps({"threads": arguments.threads, "torch": torch.__version__, "seed": 0, "rows": rows}))


@torch.inference_mode()
def _measure(name: str, model: PreTrainedModel, mask: Mask, rounds: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    modulator = Modulator(model, mask)
    # By any others the activations, multiplied again and again, would leave the numbers that are normal.
    modulator.use_factors(torch.ones(len(mask.safety) + len(mask.utility)))
    with modulator:
        for num_tokens in TOKENS:
            thresholds = torch.randint(0, 39, (num_tokens, 2), dtype=torch.int32)
            activations = [torch.randn(1, num_tokens, each.weight.shape[1]) for each in modulator.modules]
            calls = max(3, 2000 // num_tokens // len(activations))
            seconds: dict[str, list[float]] = {way: [] for way in WAYS}
            for _ in range(rounds):
                for way, most in WAYS.items():
                    with mock.patch.object(modulation.modulator, "_MOST_WIDENED", most):
                        seconds[way].append(_timed(modulator, thresholds, activations, calls))
            out, everything = (1e6 * statistics.median(seconds[way]) for way in WAYS)
            factors = activations[0].numel()
            _print(
                f"{name:<12}  {num_tokens:>6}  {factors:>14}  {out:>13.1f}  {everything:>7.1f}"
                f"  {out / everything:>5.2f}"
            )
            us = {"taken out": round(out, 1), "all": round(everything, 1)}
            rows.append({"model": name, "tokens": num_tokens, "factors": factors, "us": us})
    return rows


def _timed(modulator: Modulator, thresholds: Tensor, activations: list[Tensor], calls: int) -> float:
    """Seconds of a pass through all sites' hooks."""
    begun = time.perf_counter()
    for _ in range(calls):
        modulator.set_thresholds(thresholds)
        for module, each in zip(modulator.modules, activations, strict=True):
            for hook in module._forward_pre_hooks.values():
                hook(module, (each,))
    return (time.perf_counter() - begun) / calls


def _print(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
