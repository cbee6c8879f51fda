"""What tuning, adaptation and the sweep have found, as text for people.

Knows masks, histories and points. Knows nothing of how they come about.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from modulation.evaluation.report import aligned, percent
from modulation.masks import Mask, NeuronSet
from modulation.tuning.curve import Point

# A factor this near to 1 changes nothing that anybody could measure.
_UNTOUCHED = 0.01


def factors_table(mask: Mask) -> str:
    """By set: how many neurons are amplified, suppressed or left alone, and how far factors go."""
    rows = [("set", "neurons", "amplified", "suppressed", "within 1 %", "least", "median", "largest")]
    for kind, neurons in (("safety", mask.safety), ("utility", mask.utility)):
        if len(neurons):
            rows.append((kind, *_row(neurons.factors)))
    return aligned(rows)


def _row(factors: npt.NDArray[np.float32]) -> tuple[str, str, str, str, str, str, str]:
    untouched = np.abs(factors - 1) <= _UNTOUCHED
    amplified, suppressed = (factors > 1) & ~untouched, (factors < 1) & ~untouched
    counts = (len(factors), amplified.sum(), suppressed.sum(), untouched.sum())
    values = (factors.min(), np.median(factors), factors.max())
    a, b, c, d = map(str, counts)
    x, y, z = (f"{value:.3g}" for value in values)
    return a, b, c, d, x, y, z


def history_table(history: Sequence[Mapping[str, float]], best_step: int) -> str:
    """Every validation, the one whose factors were taken marked."""
    rows = [("step", "validation loss", "attacks whose margin fails", "borderline that would refuse", "")]
    for each in history:
        taken = "taken" if each["step"] == best_step else ""
        shares = percent(each["attack_success"]), percent(each["over_refusal"])
        rows.append((f"{each['step']:.0f}", f"{each['loss']:.4f}", *shares, taken))
    return aligned(rows)


def levels_list(mask: Mask) -> str:
    """The named levels with their thresholds, in one line."""
    return ", ".join(
        f"{level.name} ({level.threshold.num_safety}, {level.threshold.num_utility})" for level in mask.levels
    )


def movement_table(before: Mask, after: Mask) -> str:
    """By set: how far adaptation moved the factors, as ratios, and how many went up or down."""
    rows = [("set", "neurons", "mean ratio", "largest ratio", "up", "down")]
    pairs = (("safety", before.safety, after.safety), ("utility", before.utility, after.utility))
    for kind, old, new in pairs:
        if len(old):
            moved = _moved(old, new)
            size = np.exp(np.abs(moved))
            counts = (str(len(old)), f"{np.exp(np.abs(moved).mean()):.4f}", f"{size.max():.4f}")
            rows.append((kind, *counts, str((moved > 0).sum()), str((moved < 0).sum())))
    return aligned(rows)


def _moved(old: NeuronSet, new: NeuronSet) -> npt.NDArray[np.float64]:
    found: npt.NDArray[np.float64] = np.log(new.factors.astype(np.float64) / old.factors)
    return found


def curve_table(points: Sequence[Point], levels: Mapping[str, Point]) -> str:
    """Every point of the curve, those that are levels marked by name."""
    rows = [("threshold", "ASR", "over-refusal", "benign correct", "plain refused", "level")]
    for point in points:
        threshold = f"({point.threshold.num_safety}, {point.threshold.num_utility})"
        safety = percent(point.asr), percent(point.over_refusal)
        utility = percent(point.benign_correct), percent(point.refusal_plain)
        names = ", ".join(name for name, each in levels.items() if each.threshold == point.threshold)
        rows.append((threshold, *safety, *utility, names))
    return aligned(rows)
