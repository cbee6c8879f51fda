"""What whoever uses a mask may be told of it: neurons by layer, the range of the factors, recorded rates.

Knows a mask's shape and metadata, never which neurons they are. Knows no numpy and no file: a mask is read
through its own arrays.
"""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from modulation.levels import Threshold

if TYPE_CHECKING:
    from modulation.masks import Mask, NeuronSet

METRICS: Final = ("asr", "over_refusal", "benign_correct", "refusal_plain")
UNRECORDED: Final = "unrecorded"
_NAME: Final = re.compile(r"[A-Za-z0-9_.-]{1,40}")
_INTERVAL: Final = ("low", "high")

Rates = Mapping[str, Mapping[str, float]]
"""By metric: `rate`, and `low` and `high` of its 95 % interval if they are recorded; all 0 to 1."""


@dataclass(frozen=True, slots=True)
class SetProfile:
    """One neuron set: the layer of each neuron, rank 0 first, and the least and largest factor (None: the
    set is empty)."""

    layers: tuple[int, ...]
    factors: tuple[float, float] | None

    def per_layer(self, num_layers: int, num_active: int | None = None) -> list[int]:
        """How many of the first `num_active` neurons (None: of all) each layer has."""
        counts = Counter(self.layers[:num_active])
        return [counts[layer] for layer in range(num_layers)]


@dataclass(frozen=True, slots=True)
class Recorded:
    """What the mask's evaluation says of one threshold; `level` is its name, if it has one there."""

    level: str | None
    threshold: Threshold
    rates: Rates


@dataclass(frozen=True, slots=True)
class MaskProfile:
    """One mask. `method` says how neurons and factors were found: `attack_aware+maml`. `levels` are the
    recorded rates of its named levels, `curve` those of the thresholds that the levels were chosen from;
    `prompts` says what they were measured on. Empty: not recorded."""

    num_layers: int
    neurons_per_layer: int
    safety: SetProfile
    utility: SetProfile
    prompts: str
    levels: tuple[Recorded, ...]
    curve: tuple[Recorded, ...]
    method: str = UNRECORDED


def profile_of(mask: "Mask") -> MaskProfile:
    """Of this mask. The evaluation is free text of whoever made the mask: what is not a rate is left out."""
    evaluation = mask.metadata.evaluation
    by_name = evaluation.get("levels")
    found = by_name if isinstance(by_name, dict) else {}
    points = evaluation.get("curve")
    prompts = evaluation.get("prompts")
    levels = (Recorded(level.name, level.threshold, _rates(found.get(level.name))) for level in mask.levels)
    curve = (_point(each) for each in (points if isinstance(points, list) else ()))
    return MaskProfile(
        num_layers=mask.metadata.num_layers,
        neurons_per_layer=mask.metadata.neurons_per_layer,
        safety=_set(mask.safety),
        utility=_set(mask.utility),
        prompts=prompts if isinstance(prompts, str) else "",
        levels=tuple(each for each in levels if each.rates),
        curve=tuple(each for each in curve if each is not None and each.rates),
        method=_method(mask.metadata.method),
    )


def _method(recorded: Mapping[str, Any]) -> str:
    match recorded:
        case {"attribution": {"method": str(found)}, "tuning": {"settings": {"method": str(learned)}}}:
            names = [found, learned]
        case {"attribution": {"method": str(found)}}:
            names = [found]
        case _:
            names = []
    known = [name for name in names if _NAME.fullmatch(name)]
    return "+".join(known) if known and known == names else UNRECORDED


def _set(neurons: "NeuronSet") -> SetProfile:
    factors = neurons.factors
    ends = (float(factors.min()), float(factors.max())) if len(neurons) else None
    return SetProfile(tuple(neurons.neurons[:, 0].tolist()), ends)


def _point(found: Any) -> Recorded | None:
    match found:
        case {"threshold": [int(num_safety), int(num_utility)], "metrics": metrics}:
            if num_safety >= 0 and num_utility >= 0:
                return Recorded(None, Threshold(num_safety, num_utility), _rates(metrics))
    return None


def _rates(metrics: Any) -> Rates:
    if not isinstance(metrics, dict):
        return {}
    return {name: each for name in METRICS if (each := _rate(metrics.get(name)))}


def _rate(found: Any) -> dict[str, float]:
    if not isinstance(found, dict) or not _is_share(found.get("rate")):
        return {}
    return {name: float(found[name]) for name in ("rate", *_INTERVAL) if _is_share(found.get(name))}


def _is_share(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1
