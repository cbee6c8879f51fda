"""The demo mask on any split, beside random neurons with the same factors.

Knows masks and metrics. Knows nothing of how masks are made; it chooses nothing.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from modulation.demo.scorecard import scorecard_records
from modulation.demo.topics import Split
from modulation.evaluation.levels import metrics_at
from modulation.evaluation.metrics import Metrics
from modulation.levels import SECURITY_CRITICAL
from modulation.masks import Mask, NeuronSet
from modulation.modulator import Modulator


def with_random_neurons(mask: Mask, seed: int) -> Mask:
    """The same counts, factors and levels, at neurons drawn at random from those not in the mask."""
    layers, width = mask.metadata.num_layers, mask.metadata.neurons_per_layer
    members = np.concatenate([mask.safety.neurons, mask.utility.neurons])
    others = np.setdiff1d(np.arange(layers * width), members[:, 0] * width + members[:, 1])
    drawn = np.random.default_rng(seed).choice(others, size=len(members), replace=False)
    neurons = np.stack([drawn // width, drawn % width], axis=1).astype(np.int32)
    return replace(
        mask,
        safety=NeuronSet(neurons[: len(mask.safety)], mask.safety.factors),
        utility=NeuronSet(neurons[len(mask.safety) :], mask.utility.factors),
    )


def compare(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    mask: Mask,
    split: Split,
    num_random: int,
    on_answered: Callable[[int], object],
) -> dict[str, Metrics]:
    """Metrics at every level of the mask, and of `num_random` random masks at `security-critical`."""
    prompts = scorecard_records(split)
    levels = list(mask.levels)
    measured = metrics_at(
        Modulator(model, mask), tokenizer, prompts, [each.threshold for each in levels], on_answered
    )
    found = {level.name: metrics for level, metrics in zip(levels, measured, strict=True)}
    threshold = mask.levels.named[SECURITY_CRITICAL]
    for seed in range(num_random):
        modulator = Modulator(model, with_random_neurons(mask, seed))
        (found[f"random {seed}"],) = metrics_at(modulator, tokenizer, prompts, [threshold], on_answered)
    return found
