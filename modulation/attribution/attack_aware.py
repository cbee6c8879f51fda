"""Attribution under attack: which neurons make the model refuse when somebody talks it out of it.

Source: NeuronTune (arXiv 2508.09473), whose attribution is by gradient x activation with attacked
prompts included. First order, two backward passes a batch. Formulas: docs/attribution.md.
"""

import math
from collections.abc import Sequence
from typing import Any, Final, Literal, get_args

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from modulation.attribution.accumulate import Accumulator, Pass, Totals
from modulation.attribution.base import AttributionData, Scores
from modulation.attribution.gates import Integrated, gate_effects, gate_values
from modulation.attribution.teacher_forcing import (
    NUM_MARGIN_TOKENS,
    WHOLE,
    Both,
    Forced,
    Forcing,
    answer_log_odds,
    answer_log_probability,
)
from modulation.errors import DataError
from modulation.sites import Site, find_sites

Utility = Literal["helpful", "complying"]
Cost = Literal["absolute", "positive"]
Direction = Literal["either", "amplify"]

# How much what a neuron does to benign and to borderline prompts counts against it. Chosen on the demo
# model's validation prompts, see docs/trials.md.
BENIGN_WEIGHT: Final = 0.5
BORDERLINE_WEIGHT: Final = 0.5
TEXT_WEIGHT: Final = 1.0

_PLAIN: Final = "harmful"
_ATTACK: Final = "attack: "
_TEXT: Final = "words of right answers"
_REFUSALS: Final = "words of refusals"


def attack_aware(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    data: AttributionData,
    accumulator: Accumulator,
    *,
    utility: Utility = "helpful",
    direction: Direction = "either",
    benign_weight: float = BENIGN_WEIGHT,
    borderline_weight: float = BORDERLINE_WEIGHT,
    attack_weight: float = 1.0,
    text_weight: float = TEXT_WEIGHT,
    cost: Cost = "positive",
    include_plain: bool = True,
    quantile: float = 0.25,
    helpful_borderline: float = 0.5,
    margin_tokens: int = NUM_MARGIN_TOKENS,
    integrated: Integrated = "none",
    steps: int = 8,
) -> Scores:
    """Score neurons by their first-order effect on the refusal margin of attacked prompts.

    The refusal margin is the log-probability of the refusing answer's first `margin_tokens` tokens minus
    that of the complying one's. A neuron counts only if it matters under most attacks: its effect is the
    `quantile` (0: the least, 1: the largest) of its mean effects per attack family and, with
    `include_plain`, on plain harmful prompts. From it goes the cost: what the neuron does to the margin of
    benign and borderline prompts, weighted.

    `cost`: `absolute` is the mean of absolute effects, in which what helps one prompt does not make up for
    what harms another; `positive` is the positive part of the mean effect.
    `utility`: `helpful` is the effect on the likelihood of the right answers, against that of refusing, to
    benign prompts and, with the share `helpful_borderline`, to borderline ones, less `attack_weight` times
    the mean effect towards going along with attacks; `complying` is the effect towards going along with
    every attack, less the cost.
    `text_weight`: how much it counts against a neuron, in both sets and either direction, that it moves the
    words of right benign answers and of refusals: the mean absolute effect on their log-odds.
    `direction`: `amplify` scores what scaling a neuron up does; `either` the better of scaling it up and
    down, for factors that are learned: the tuning finds out which way.
    `integrated`, `steps`: see `gate_values`.

    Raises DataError for missing examples and for options that are out of range.
    """
    values = gate_values(integrated, steps)
    _check_words(utility=(utility, Utility), cost=(cost, Cost), direction=(direction, Direction))
    _check_shares(quantile=quantile, helpful_borderline=helpful_borderline)
    _check_margin_tokens(margin_tokens)
    _check_data(
        data,
        include_plain or text_weight > 0,
        borderline_weight,
        helpful_borderline if utility == "helpful" else 0.0,
    )
    sites, forcing = find_sites(model), Forcing(model, tokenizer)

    def margins(batch: Sequence[Both]) -> dict[str, Tensor]:
        effects = _log_probability_effects(model, sites, [each.refusing for each in batch], values)
        effects = effects - _log_probability_effects(model, sites, [each.complying for each in batch], values)
        return {"effect": effects.sum(dim=0), "absolute": effects.abs().sum(dim=0)}

    def words(batch: Sequence[Forced]) -> dict[str, Tensor]:
        effects = gate_effects(model, sites, lambda: answer_log_odds(model, batch), values)
        return {"absolute": effects.abs().sum(dim=0)}

    groups = {f"{_ATTACK}{family}": examples for family, examples in data.attacked.items()}
    groups |= {_PLAIN: data.harmful} if include_plain else {}
    groups |= {"benign": data.benign}
    shares = _helpful_shares(helpful_borderline) if utility == "helpful" else {}
    groups |= {"borderline": data.borderline} if borderline_weight or "borderline" in shares else {}
    passes: list[Pass[Both] | Pass[Forced]] = [
        Pass(name, forcing.both(examples, margin_tokens), margins) for name, examples in groups.items()
    ]
    if text_weight:
        passes.append(Pass(_TEXT, forcing.complying(data.benign, WHOLE), words))
        passes.append(Pass(_REFUSALS, forcing.refusing(data.harmful, WHOLE), words))
    totals = accumulator.run(passes)

    harmful = [totals[name].mean("effect") for name in groups if name == _PLAIN or name.startswith(_ATTACK)]
    weights = {"benign": benign_weight, "borderline": borderline_weight}
    attacks = [totals[name].mean("effect") for name in groups if name.startswith(_ATTACK)]
    helpful = _weighted({name: -totals[name].mean("effect") for name in shares}, shares)

    breaks = [totals[name].mean("absolute") for name in (_TEXT, _REFUSALS) if name in totals]
    broken = text_weight * sum(breaks, torch.zeros(()))

    def safety(sign: float) -> Tensor:
        effect = _quantile([sign * each for each in harmful], quantile)
        return effect - _cost(totals, weights, cost, sign) - broken

    def useful(sign: float) -> Tensor:
        if utility == "complying":
            return safety(-sign)
        complying = (-sign * torch.stack(attacks).mean(dim=0)).clamp(min=0)
        return sign * helpful - attack_weight * complying - broken

    if direction == "amplify":
        return Scores(safety=safety(1.0), utility=useful(1.0))
    return Scores(
        safety=torch.maximum(safety(1.0), safety(-1.0)), utility=torch.maximum(useful(1.0), useful(-1.0))
    )


def _log_probability_effects(
    model: PreTrainedModel, sites: Sequence[Site], batch: Sequence[Forced], values: Sequence[float]
) -> Tensor:
    return gate_effects(model, sites, lambda: answer_log_probability(model, batch), values)


def _quantile(means: Sequence[Tensor], share: float) -> Tensor:
    """A neuron's quantile over the groups, linear between neighbours: a neuron counts as far as it matters
    in all but the share of groups in which it matters least. `torch.quantile` takes no large tensors."""
    ordered = torch.stack(list(means)).sort(dim=0).values  # (groups, layers, neurons)
    place = share * (len(means) - 1)
    low, high = ordered[math.floor(place)], ordered[math.ceil(place)]
    return low + (place - math.floor(place)) * (high - low)


def _cost(totals: dict[str, Totals], weights: dict[str, float], cost: Cost, sign: float) -> Tensor:
    """What scaling up a neuron costs, `sign` being the direction in which it moves the margin."""
    parts = {
        name: totals[name].mean("absolute")
        if cost == "absolute"
        else (sign * totals[name].mean("effect")).clamp(min=0)
        for name, weight in weights.items()
        if weight
    }
    return _weighted(parts, weights)


def _weighted(parts: dict[str, Tensor], weights: dict[str, float]) -> Tensor:
    return sum((weights[name] * part for name, part in parts.items()), torch.zeros(()))


def _helpful_shares(borderline: float) -> dict[str, float]:
    shares = {"benign": 1.0 - borderline, "borderline": borderline}
    return {name: share for name, share in shares.items() if share}


def _check_words(**given: tuple[str, Any]) -> None:
    for name, (value, accepted) in given.items():
        if value not in get_args(accepted):
            raise DataError(f"Option {name}={value!r} is unknown; accepted: {', '.join(get_args(accepted))}.")


def _check_shares(**given: float) -> None:
    for name, value in given.items():
        if not 0 <= value <= 1:
            raise DataError(f"Option {name}={value:g}: a share from 0 to 1 is needed.")


def _check_margin_tokens(margin_tokens: int) -> None:
    if margin_tokens < 0:
        raise DataError(
            f"Option margin_tokens={margin_tokens}: a whole number from 0 is needed (0: all tokens)."
        )


def _check_data(
    data: AttributionData, needs_plain: bool, borderline_weight: float, helpful_borderline: float
) -> None:
    data.require("attacked", "benign", *(["harmful"] if needs_plain else []))
    if borderline_weight or helpful_borderline:
        data.require(
            "borderline",
            way_out=" Options borderline_weight=0 and helpful_borderline=0 do without.",
        )
