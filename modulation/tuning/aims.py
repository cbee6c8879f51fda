"""Which threshold a prompt is learned at, and what counts how much there.

Knows thresholds and weights. The factors of one mask serve every threshold, so they are learned at many
at once: half of the prompts at the anchors, from which the named levels are likely to be chosen (every
second of them all neurons, of which most is asked), the other half at thresholds drawn at random (the idea
of nested dropout, arXiv 1402.0915), so that a rank means importance and the curve between levels is smooth.
"""

import random
from dataclasses import dataclass
from typing import Final

from modulation.levels import Threshold
from modulation.tuning.settings import TuningSettings

# Shares of (safety, utility) neurons: everything; half and a fifth of the safety neurons.
ANCHOR_SHARES: Final = ((1.0, 1.0), (0.5, 1.0), (0.2, 1.0))
ANCHOR_WEIGHTS: Final = (2, 1, 1)
_ANCHORED_SHARE: Final = 0.5
_WHOLE_UTILITY_SHARE: Final = 0.5


@dataclass(frozen=True, slots=True)
class Aims:
    """The thresholds up to `maximum`, and how the weights go with the share of safety neurons.

    With `all_active` every prompt is learned at `maximum`: which candidates are worth most is asked of all
    of them together, and their ranks are still to come.
    """

    maximum: Threshold
    settings: TuningSettings
    all_active: bool = False

    @property
    def anchors(self) -> tuple[Threshold, ...]:
        """Where validation and adaptation look; the first is the whole mask."""
        if self.all_active:
            return (self.maximum,)
        return tuple(
            Threshold(round(safety * self.maximum.num_safety), round(utility * self.maximum.num_utility))
            for safety, utility in ANCHOR_SHARES
        )

    def draw(self, source: random.Random) -> Threshold:
        """A threshold to learn a prompt at."""
        if self.all_active:
            return self.maximum
        if source.random() < _ANCHORED_SHARE:
            return source.choices(self.anchors, ANCHOR_WEIGHTS)[0]
        whole = source.random() < _WHOLE_UTILITY_SHARE
        return Threshold(
            source.randint(0, self.maximum.num_safety),
            self.maximum.num_utility if whole else source.randint(0, self.maximum.num_utility),
        )

    def weight(self, kind: str, threshold: Threshold) -> float:
        """What the margin of a prompt of `kind` counts: attacks more the more safety neurons are active."""
        settings = self.settings
        share = threshold.num_safety / max(1, self.maximum.num_safety)
        if kind == "attacked":
            return _between(settings.attacked_weight_low, settings.attacked_weight, share)
        if kind == "borderline":
            return _between(settings.borderline_weight_low, settings.borderline_weight, share)
        return settings.harmful_weight if kind == "harmful" else settings.benign_weight


def _between(low: float, high: float, share: float) -> float:
    return low + (high - low) * share
