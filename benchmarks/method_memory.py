"""What attribution and tuning need: peak memory and seconds on a model of 135 million random parameters.

The shape is SmolLM-135M's, in bfloat16; the tokenizer and the prompts are the demo model's. What scores and
factors mean is not looked at: the weights are random.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import sys
import time
from itertools import pairwise

import torch
import transformers
from transformers import PreTrainedModel

from benchmarks.shapes import config_of, random_model
from modulation.attribution.accumulate import Accumulator
from modulation.attribution.base import Attribution, AttributionData, Scores
from modulation.attribution.examples import attribution_data
from modulation.attribution.methods import METHODS
from modulation.demo import MODEL_DIR
from modulation.demo.corpus import records
from modulation.demo.topics import Kind
from modulation.loading import load_tokenizer
from modulation.tuning.commands import SHARE
from modulation.tuning.drafting import counts, draft, top_neurons
from modulation.tuning.runs import TuningRun, tune
from modulation.tuning.settings import TuningSettings

GROUPS: tuple[tuple[Kind, str | None], ...] = (
    ("harmful", None),
    ("harmful", "grandmother"),
    ("harmful", "few_shot"),
    ("benign", None),
    ("borderline", None),
)


def main() -> None:
    arguments = _arguments()
    model = random_model(config_of("smollm2-135m"), arguments.seed)
    data = _data(arguments.per_group)
    before = _peak_bytes()
    seconds, scores = _attributed(METHODS[arguments.method], model, data, arguments.batch_size)
    attributed = _peak_bytes()
    settings = TuningSettings.parse([*arguments.option, f"num_steps={arguments.steps}"])
    step_seconds = _tuned(model, data, scores, settings)
    figures = {
        "hardware": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
        "model": f"Llama, {model.num_parameters():,} random parameters, {model.dtype}",
        "load": f"{len(GROUPS) * arguments.per_group} prompts, batches of {arguments.batch_size}",
        "method": arguments.method,
        "tuning": f"{arguments.steps} steps of {settings.method}, "
        f"{'second' if settings.second_order else 'first'} order, "
        f"{settings.batch_size} + {settings.support_size} prompts a step, validation at the end",
        "seed": arguments.seed,
        "command": " ".join(["python -m benchmarks.method_memory", *sys.argv[1:]]),
        "attribution_seconds": round(seconds, 1),
        "seconds_per_step": round(statistics.median(step_seconds), 1),
        "peak_before_gb": round(before / 1e9, 2),
        "peak_attribution_gb": round(attributed / 1e9, 2),
        "peak_gb": round(_peak_bytes() / 1e9, 2),
    }
    for name, value in figures.items():
        sys.stdout.write(f"{name:<20} {value}\n")
    sys.stdout.write(json.dumps(figures) + "\n")


def _data(per_group: int) -> AttributionData:
    return attribution_data(
        record for kind, family in GROUPS for record in records(kind, "tune", family)[:per_group]
    )


def _attributed(
    method: Attribution, model: PreTrainedModel, data: AttributionData, batch_size: int
) -> tuple[float, Scores]:
    """The seconds that it took, and the scores."""
    start = time.perf_counter()
    scores = method(model, load_tokenizer(str(MODEL_DIR)), data, Accumulator(batch_size=batch_size))
    return time.perf_counter() - start, scores


def _tuned(
    model: PreTrainedModel, data: AttributionData, scores: Scores, settings: TuningSettings
) -> list[float]:
    """The seconds of every step, the last one with the validation that ends the run."""
    mask = draft(model, "random", *top_neurons(scores, *counts(model, SHARE)))
    ends = [time.perf_counter()]
    tune(
        model,
        load_tokenizer(str(MODEL_DIR)),
        data,
        data,
        mask,
        TuningRun(settings),
        on_step=lambda *_: ends.append(time.perf_counter()),
    )
    return [end - start for start, end in pairwise(ends)]


def _peak_bytes() -> int:
    """The process's largest resident memory so far; Linux counts it in KiB, macOS in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--method", choices=list(METHODS), default="attack_aware")
    parser.add_argument("--per-group", type=int, default=16, help="prompts of each of five groups")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=3, help="of tuning")
    parser.add_argument("--option", action="append", default=[], help="of tuning, KEY=VALUE; repeatable")
    parser.add_argument("--seed", type=int, default=0, help="of the weights")
    return parser.parse_args()


if __name__ == "__main__":
    main()
