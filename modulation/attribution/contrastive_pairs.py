"""Attribution by contrastive pairs: neurons that tell harmful from benign prompts before any answer.

Source: contrastive neuron attribution (CNA), "Targeted Neuron Modulation via Contrastive Pair Search"
(arXiv 2605.12290). Forward passes only. The paper ranks by the absolute difference and has one set; here
the direction of the neuron's own activation tells safety from utility.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from modulation.attribution.accumulate import Accumulator, Pass
from modulation.attribution.base import AttributionData, Scores
from modulation.attribution.gates import read_activations
from modulation.attribution.teacher_forcing import Forced, Forcing, padded
from modulation.errors import DataError
from modulation.sites import find_sites


def contrastive_pairs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    data: AttributionData,
    accumulator: Accumulator,
    *,
    universal_top: float = 0.001,
    universal_share: float = 0.8,
) -> Scores:
    """Score neurons by the difference of their mean activation at the last token of harmful and of benign
    prompts, in the direction of the mean on harmful (safety) or benign (utility) ones.

    Left out, with score 0, are neurons that fire for everything: those that are among the share
    `universal_top` of all neurons with the largest absolute activation on more than the share
    `universal_share` of all prompts.

    Raises DataError for missing harmful or benign prompts and for shares out of range.
    """
    for name, share in (("universal_top", universal_top), ("universal_share", universal_share)):
        if not 0 <= share <= 1:
            raise DataError(f"Option {name}={share:g}: a share from 0 to 1 is needed.")
    data.require("harmful", "benign")
    sites, forcing = find_sites(model), Forcing(model, tokenizer)
    num_top = max(1, round(universal_top * sum(site.width for site in sites)))

    def read(batch: Sequence[Forced]) -> dict[str, Tensor]:
        tokens, last = padded(batch, model.device)
        found = read_activations(model, sites, tokens, lambda each: each[last])  # (layers, rows, neurons)
        return {"activation": found.sum(dim=1), "among_top": _among_top(found, num_top).sum(dim=1)}

    totals = accumulator.run(
        [
            Pass("harmful", forcing.prompts(data.all_harmful), read),
            Pass("benign", forcing.prompts(data.benign), read),
        ]
    )
    harmful, benign = (totals[name].mean("activation") for name in ("harmful", "benign"))
    num_prompts = sum(each.count for each in totals.values())
    times = sum((each.sums["among_top"] for each in totals.values()), torch.zeros(()))
    particular = (times <= universal_share * num_prompts).float()
    return Scores(
        safety=(harmful - benign) * harmful.sign() * particular,
        utility=(benign - harmful) * benign.sign() * particular,
    )


def _among_top(activations: Tensor, num_top: int) -> Tensor:
    """1.0 for the `num_top` neurons of each row that fire most, of (layers, rows, neurons)."""
    layers, rows, neurons = activations.shape
    flat = activations.abs().transpose(0, 1).reshape(rows, -1)
    chosen = torch.zeros_like(flat).scatter(1, flat.topk(num_top, dim=1).indices, 1.0)
    return chosen.reshape(rows, layers, neurons).transpose(0, 1)
