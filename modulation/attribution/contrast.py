"""Attribution by activation contrast: neurons that fire more in a refusal than in compliance.

Source: the activation contrasting of "Finding Safety Neurons in Large Language Models" (arXiv
2406.14144). There the activations of an aligned and an unaligned model are compared on one prompt;
here those of one model, while it refuses and while it complies with one harmful prompt.
"""

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from modulation.attribution.base import AttributionData, Scores
from modulation.attribution.gates import mean_activation


def contrast(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, data: AttributionData) -> Scores:
    """Score neurons by the difference of their mean activation in both answers to harmful prompts.

    A neuron counts by magnitude, so the difference is taken in the direction of the neuron's own
    mean activation while refusing (safety) or complying (utility).
    """
    examples = [*data.harmful, *(e for family in data.attacked.values() for e in family)]
    refusing = mean_activation(model, tokenizer, [(e.prompt, e.refusing) for e in examples])
    complying = mean_activation(model, tokenizer, [(e.prompt, e.complying) for e in examples])
    return Scores(
        safety=(refusing - complying) * refusing.sign(),
        utility=(complying - refusing) * complying.sign(),
    )
