"""Attribution by set difference: what safe answers need most, without what useful answers need most.

Source: "Assessing the Brittleness of Safety Alignment via Pruning and Low-Rank Modifications" (arXiv
2402.05162), with the importance scores of SNIP (arXiv 1810.02340) and Wanda (arXiv 2306.11695). There
single weights are compared within a matrix or a row of it; here the scores of a neuron's weights, one
column of the output projection, are summed, and all neurons of the model are compared.
"""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from modulation.attribution.accumulate import Accumulator, Pass, Totals
from modulation.attribution.base import AttributionData, Scores
from modulation.attribution.gates import read_activations, weight_effects
from modulation.attribution.teacher_forcing import WHOLE, Forced, Forcing, answer_log_probability, padded
from modulation.errors import DataError
from modulation.sites import Site, find_sites, input_dimension

Score = Literal["snip", "wanda"]


def set_difference(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    data: AttributionData,
    accumulator: Accumulator,
    *,
    score: Score = "snip",
    q: float = 0.05,
    p: float = 0.05,
    answer_tokens: int = WHOLE,
) -> Scores:
    """Score neurons by their importance to refusing answers, where it is among the top share `q` and the
    importance to right answers is not among the top share `p`; 0 elsewhere. Utility: the other way round.

    `snip`: |weight x gradient| of the answer's log-probability, a mean over prompts. `wanda`: |weight| x
    the norm of the neuron's activation over all answers. Refusing answers are to harmful prompts, plain
    and attacked; right ones to benign and borderline prompts; of both the first `answer_tokens` tokens (0:
    all).

    Raises DataError for missing harmful or benign prompts and for options out of range.
    """
    _check_options(score, q, p, answer_tokens)
    data.require("harmful", "benign")
    sites, forcing = find_sites(model), Forcing(model, tokenizer)

    def snip(batch: Sequence[Forced]) -> dict[str, Tensor]:
        return {
            "importance": weight_effects(
                model, sites, lambda: answer_log_probability(model, batch), _weighted_column_sums
            )
        }

    def squares(batch: Sequence[Forced]) -> dict[str, Tensor]:
        tokens, answers = padded(batch, model.device)
        found = read_activations(model, sites, tokens, lambda each: each[answers].square().sum(dim=0))
        return {"squares": found}

    useful = (*data.benign, *data.borderline)
    step = snip if score == "snip" else squares
    totals = accumulator.run(
        [
            Pass("safety", forcing.refusing(data.all_harmful, answer_tokens), step),
            Pass("utility", forcing.complying(useful, answer_tokens), step),
        ]
    )
    safety, utility = (_importance(sites, totals[name], score) for name in ("safety", "utility"))
    return Scores(
        safety=safety * (_top(safety, q) & ~_top(utility, p)),
        utility=utility * (_top(utility, q) & ~_top(safety, p)),
    )


def _importance(sites: Sequence[Site], totals: Totals, score: Score) -> Tensor:
    if score == "snip":
        return totals.mean("importance")
    columns = torch.stack([_weight(site).abs().sum(dim=0).cpu() for site in sites])
    return columns * totals.sums["squares"].sqrt()


def _weighted_column_sums(site: Site, gradient: Tensor) -> Tensor:
    return (_weight(site) * gradient).abs().sum(dim=0)


def _weight(site: Site) -> Tensor:
    """The projection's weight as float32 (outputs, neurons)."""
    weight = site.module.weight
    assert isinstance(weight, Tensor)
    weight = weight.detach().float()
    return weight if input_dimension(site.module) == 1 else weight.T


def _top(scores: Tensor, share: float) -> Tensor:
    """Which are among the top `share` of all neurons, bool."""
    chosen = scores.flatten().argsort(descending=True, stable=True)[: round(share * scores.numel())]
    return torch.zeros(scores.numel(), dtype=torch.bool).scatter(0, chosen, True).reshape(scores.shape)


def _check_options(score: str, q: float, p: float, answer_tokens: int) -> None:
    if score not in get_args(Score):
        raise DataError(f"Option score={score!r} is unknown; accepted: {', '.join(get_args(Score))}.")
    for name, share in (("q", q), ("p", p)):
        if not 0 <= share <= 1:
            raise DataError(f"Option {name}={share:g}: a share from 0 to 1 is needed.")
    if answer_tokens < 0:
        raise DataError(f"Option answer_tokens={answer_tokens}: a whole number from 0 is needed (0: all).")
