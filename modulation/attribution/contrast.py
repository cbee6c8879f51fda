"""Attribution by activation contrast: neurons that fire more in a refusal than in compliance.

Source: the activation contrasting of "Finding Safety Neurons in Large Language Models" (arXiv
2406.14144). There the activations of an aligned and an unaligned model are compared on one prompt;
here those of one model, while it refuses and while it complies with one harmful prompt. There a neuron
counts by the root mean square of its differences; here by the difference of means, whose sign tells
safety from utility.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from modulation.attribution.accumulate import Accumulator, Pass
from modulation.attribution.base import AttributionData, Scores
from modulation.attribution.gates import read_activations
from modulation.attribution.teacher_forcing import NUM_MARGIN_TOKENS, Forced, Forcing, padded
from modulation.errors import DataError
from modulation.sites import find_sites


def contrast(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    data: AttributionData,
    accumulator: Accumulator,
    *,
    answer_tokens: int = NUM_MARGIN_TOKENS,
) -> Scores:
    """Score neurons by the difference of their mean activation in both answers to harmful prompts.

    A neuron counts by magnitude, so the difference is taken in the direction of the neuron's own
    mean activation while refusing (safety) or complying (utility). The mean is over the tokens that
    predict the first `answer_tokens` tokens of an answer (0: all), then over prompts, plain and attacked.

    Raises DataError where there are no plain harmful prompts.
    """
    if answer_tokens < 0:
        raise DataError(f"Option answer_tokens={answer_tokens}: a whole number from 0 is needed (0: all).")
    data.require("harmful")
    sites, forcing = find_sites(model), Forcing(model, tokenizer)

    def read(batch: Sequence[Forced]) -> dict[str, Tensor]:
        tokens, answers = padded(batch, model.device)
        weights = answers.float() / answers.sum(dim=1, keepdim=True)  # (rows, tokens)
        return {
            "activation": read_activations(
                model, sites, tokens, lambda found: torch.einsum("rt,rtn->n", weights, found)
            )
        }

    totals = accumulator.run(
        [
            Pass("refusing", forcing.refusing(data.all_harmful, answer_tokens), read),
            Pass("complying", forcing.complying(data.all_harmful, answer_tokens), read),
        ]
    )
    refusing, complying = (totals[name].mean("activation") for name in ("refusing", "complying"))
    return Scores(
        safety=(refusing - complying) * refusing.sign(),
        utility=(complying - refusing) * complying.sign(),
    )
