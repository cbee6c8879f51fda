"""Attribution under attack: which neurons make the model refuse when somebody talks it out of it.

Source: NeuronTune (arXiv 2508.09473), whose attribution is by gradient x activation with attacked
prompts included. First order, one backward pass per batch.
"""

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from modulation.attribution.base import AttributionData, Scores
from modulation.attribution.gates import margin_gradient


def attack_aware(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, data: AttributionData) -> Scores:
    """Score neurons by their first-order effect on the refusal margin of attacked prompts.

    The effect is the mean over attack families, so that a large family does not outvote the others.
    Safety: the effect, less what the neuron does towards refusing benign and borderline prompts.
    Utility: the effect's negative, that is how much the neuron makes the model go along with an
    attack, less what it does towards helping with benign and borderline prompts.
    """
    families = [margin_gradient(model, tokenizer, examples) for examples in data.attacked.values()]
    attacked = torch.stack(families).mean(dim=0)
    benign = margin_gradient(model, tokenizer, [*data.benign, *data.borderline])
    return Scores(
        safety=attacked - benign.clamp(min=0),
        utility=-attacked - (-benign).clamp(min=0),
    )
