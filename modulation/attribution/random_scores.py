"""The control: scores drawn at random. What a real method finds must beat what this one finds.

Knows shapes and a seed; reads neither the data nor the weights.
"""

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from modulation.attribution.accumulate import Accumulator
from modulation.attribution.base import AttributionData, Scores
from modulation.sites import find_sites


def random_scores(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,  # noqa: ARG001
    data: AttributionData,  # noqa: ARG001
    accumulator: Accumulator,  # noqa: ARG001
    *,
    seed: int = 0,
) -> Scores:
    """Uniform scores in (0, 1], drawn anew for safety and for utility. Raises nothing."""
    sites = find_sites(model)
    generator = torch.Generator().manual_seed(seed)
    shape = (2, len(sites), sites[0].width)
    safety, utility = 1.0 - torch.rand(shape, generator=generator, dtype=torch.float32)
    return Scores(safety=safety, utility=utility)
