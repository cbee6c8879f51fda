"""Attribution under attack: which neurons make the model refuse when somebody talks it out of it.

Source: NeuronTune (arXiv 2508.09473), whose attribution is by gradient x activation with attacked
prompts included. First order, one backward pass per batch.
"""

from typing import Final

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from modulation.attribution.base import AttributionData, Scores
from modulation.attribution.gates import margin_gradient

# How much what a neuron does to benign and to borderline prompts counts against it. Chosen on the demo
# model's validation prompts, see docs/method.md.
BENIGN_WEIGHT: Final = 0.7
BORDERLINE_WEIGHT: Final = 0.25


def attack_aware(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, data: AttributionData) -> Scores:
    """Score neurons by their first-order effect on the refusal margin of attacked prompts.

    A neuron counts only if it matters under every attack: its effect is the least of its mean effects
    per attack family, so that neurons that know one wrapper drop out. From it goes what the neuron does
    to benign and borderline prompts, in either direction (the mean of absolute effects).
    Safety: the effect towards refusing. Utility: the effect towards going along with the attack.

    Raises ValueError when there are no attacked, benign or borderline examples.
    """
    groups = {"benign": data.benign, "borderline": data.borderline, **data.attacked}
    empty = [name for name, examples in groups.items() if not examples]
    if empty or not data.attacked:
        raise ValueError(f"Attribution under attack has no examples of: {', '.join(empty) or 'any attack'}.")
    attacked = torch.stack(
        [margin_gradient(model, tokenizer, examples).mean for examples in data.attacked.values()]
    )
    cost = BENIGN_WEIGHT * margin_gradient(model, tokenizer, data.benign).mean_absolute
    cost += BORDERLINE_WEIGHT * margin_gradient(model, tokenizer, data.borderline).mean_absolute
    return Scores(
        safety=attacked.min(dim=0).values - cost,
        utility=(-attacked).min(dim=0).values - cost,
    )
