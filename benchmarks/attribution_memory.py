"""What attribution needs: peak memory and seconds on a model of 135 million random parameters.

The shape is SmolLM-135M's, in bfloat16; the tokenizer and the prompts are the demo model's. What the scores
mean is not looked at: the weights are random.
"""

import argparse
import json
import os
import platform
import resource
import sys
import time

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

from modulation.attribution.accumulate import Accumulator
from modulation.attribution.base import Attribution, AttributionData
from modulation.attribution.examples import attribution_data
from modulation.attribution.methods import METHODS
from modulation.demo import MODEL_DIR
from modulation.demo.corpus import records
from modulation.demo.topics import Kind
from modulation.loading import load_tokenizer

GROUPS: tuple[tuple[Kind, str | None], ...] = (
    ("harmful", None),
    ("harmful", "grandmother"),
    ("harmful", "few_shot"),
    ("benign", None),
    ("borderline", None),
)


def main() -> None:
    arguments = _arguments()
    model = _model(arguments.seed)
    data = _data(arguments.per_group)
    before = _peak_bytes()
    seconds = _seconds(METHODS[arguments.method], model, data, arguments.batch_size)
    figures = {
        "hardware": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
        "model": f"Llama, {model.num_parameters():,} random parameters, {model.dtype}",
        "load": f"{len(GROUPS) * arguments.per_group} prompts, batches of {arguments.batch_size}",
        "method": arguments.method,
        "seed": arguments.seed,
        "command": " ".join(["python -m benchmarks.attribution_memory", *sys.argv[1:]]),
        "seconds": round(seconds, 1),
        "peak_before_gb": round(before / 1e9, 2),
        "peak_gb": round(_peak_bytes() / 1e9, 2),
    }
    for name, value in figures.items():
        sys.stdout.write(f"{name:<15} {value}\n")
    sys.stdout.write(json.dumps(figures) + "\n")


def _model(seed: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    torch.manual_seed(seed)
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(torch.float32)
    model.train(False)
    return model


def _data(per_group: int) -> AttributionData:
    return attribution_data(
        record for kind, family in GROUPS for record in records(kind, "tune", family)[:per_group]
    )


def _seconds(method: Attribution, model: LlamaForCausalLM, data: AttributionData, batch_size: int) -> float:
    tokenizer = load_tokenizer(str(MODEL_DIR))
    start = time.perf_counter()
    method(model, tokenizer, data, Accumulator(batch_size=batch_size))
    return time.perf_counter() - start


def _peak_bytes() -> int:
    """The process's largest resident memory so far; Linux counts it in KiB, macOS in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--method", choices=list(METHODS), default="attack_aware")
    parser.add_argument("--per-group", type=int, default=16, help="prompts of each of five groups")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0, help="of the weights")
    return parser.parse_args()


if __name__ == "__main__":
    main()
