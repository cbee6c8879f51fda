"""Levels for a tuned mask: the sweep with a model, and what it leaves in the mask's metadata.

Knows the modulator, records and masks. Knows nothing of commands.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any, Final

from transformers import PreTrainedTokenizerFast

from modulation.checkpoints import Checkpoint
from modulation.errors import DataError, LevelError
from modulation.evaluation.answer_file import data_digest
from modulation.evaluation.data import Record
from modulation.evaluation.levels import metrics_at
from modulation.evaluation.metrics import Metrics
from modulation.levels import OFF, Threshold
from modulation.masks import Mask
from modulation.modulator import Modulator
from modulation.tuning.curve import RULE, Measured, Point, choose, grid, pooled, sweep

_NEEDED = {
    "attacked": ("harmful", True),
    "plain harmful": ("harmful", False),
    "borderline": ("borderline", False),
    "benign": ("benign", False),
}

SHARED_LEVELS: Final = "shared_levels"
"""In the metadata's `method`: of which seeds the masks are whose curves chose the levels."""

OnAnswered = Callable[[int], object]


class KeptPoints:
    """What a sweep has measured so far, kept in its checkpoint after every threshold if there is one.

    Raises CheckpointError for a checkpoint that is damaged or of another run.
    """

    def __init__(self, checkpoint: Checkpoint | None = None) -> None:
        reached = checkpoint.load() if checkpoint else None
        points = reached.progress["points"] if reached else []
        self._checkpoint = checkpoint
        self._metrics: dict[Threshold, Metrics] = {
            Threshold(*each["threshold"]): each["metrics"] for each in points
        }

    def __len__(self) -> int:
        return len(self._metrics)

    def measured(self, measure: Measured) -> Measured:
        """As `measure`, but each threshold is measured once, in this run or in the one before."""

        def once(threshold: Threshold) -> Metrics:
            if threshold not in self._metrics:
                self._metrics[threshold] = measure(threshold)
                self._save()
            return self._metrics[threshold]

        return once

    def _save(self) -> None:
        if self._checkpoint:
            points = [Point(threshold, metrics).to_json() for threshold, metrics in self._metrics.items()]
            self._checkpoint.save({}, {"points": points})


def sweep_key(mask: Mask, records: Sequence[Record], device: str, dtype: str) -> str:
    """Of everything that the curve depends on."""
    parts = (mask.digest, data_digest(records), device, dtype)
    return hashlib.sha256("|".join(parts).encode()).hexdigest()[:16]


def refuse_lacking(records: Sequence[Record]) -> None:
    """Raise DataError where the records lack a kind of prompt that the rule needs."""
    there = {(each.kind, each.kind == "harmful" and each.family is not None) for each in records}
    missing = [words for words, kind in _NEEDED.items() if kind not in there]
    if missing:
        raise DataError(
            f"The data hold no {' and no '.join(missing)} prompts: levels are chosen by attacked and plain "
            "harmful, borderline and benign ones. Add them; --attacks all wraps plain harmful ones."
        )


def measured_points(
    modulator: Modulator,
    tokenizer: PreTrainedTokenizerFast,
    mask: Mask,
    records: Sequence[Record],
    on_answered: OnAnswered | None = None,
    kept: KeptPoints | None = None,
) -> list[Point]:
    """The curve: every threshold of the grid, answered greedily; `off` first."""

    def measure(threshold: Threshold) -> Metrics:
        return metrics_at(modulator, tokenizer, records, [threshold], on_answered)[0]

    once = (KeptPoints() if kept is None else kept).measured(measure)
    return sweep(once, grid(mask.levels.maximum))


def with_levels(
    mask: Mask, points: Sequence[Point], records: Sequence[Record], source: str, allow_less_safe: bool = False
) -> Mask:
    """The mask with the levels that the rule chooses, the rule, the curve and the results.

    Raises LevelError as `choose` does.
    """
    return _leveled(mask, points, data_digest(records), source, allow_less_safe)


def with_shared_levels(masks: Sequence[Mask], allow_less_safe: bool = False) -> list[Mask]:
    """The masks with the levels that the rule chooses on all their curves together.

    A curve of a few hundred prompts errs by a few points, the curves of masks made alike with other seeds err
    differently. Raises LevelError as `pooled` and `choose` do, for fewer than two masks, for masks of one
    seed or of different models, and for a mask that has no curve of its own.
    """
    _refuse_unlike(masks)
    points = pooled([_curve(mask) for mask in masks])
    shared = {"seeds": [mask.metadata.seeds.get("tuning") for mask in masks]}
    sources = ", ".join(dict.fromkeys(mask.metadata.evaluation["prompts"] for mask in masks))
    digests = "|".join(mask.metadata.data_digests["levels"] for mask in masks)
    digest = hashlib.sha256(digests.encode()).hexdigest()[:16]
    source = f"{sources}, {len(masks)} masks together"
    return [
        _leveled(mask, points, digest, source, allow_less_safe, {SHARED_LEVELS: shared}) for mask in masks
    ]


def _refuse_unlike(masks: Sequence[Mask]) -> None:
    seeds = [mask.metadata.seeds.get("tuning") for mask in masks]
    for mask, seed in zip(masks, seeds, strict=True):
        if SHARED_LEVELS in mask.metadata.method:
            raise LevelError(
                f"The mask of seed {seed} has shared levels already: give each mask as it was before."
            )
        if "curve" not in mask.metadata.evaluation:
            raise LevelError(f"The mask of seed {seed} has no curve: choose levels for it alone first.")
    if len(masks) < 2 or len(set(seeds)) < len(masks):
        raise LevelError(
            f"Levels are shared by two masks or more, each of a seed of its own; these are of {seeds}."
        )
    if len({mask.metadata.model_fingerprint for mask in masks}) > 1:
        raise LevelError("The masks are of different models: levels are shared by masks of one.")


def _curve(mask: Mask) -> list[Point]:
    found = mask.metadata.evaluation["curve"]
    return [Point(Threshold(*each["threshold"]), each["metrics"]) for each in found]


def _leveled(
    mask: Mask,
    points: Sequence[Point],
    data: str,
    source: str,
    allow_less_safe: bool,
    shared: Mapping[str, Any] = MappingProxyType({}),
) -> Mask:
    """`data` is the digest of the prompts and `source` what they are; `shared` goes into the method."""
    method = {name: step for name, step in mask.metadata.method.items() if name != SHARED_LEVELS}
    levels = choose(points, allow_less_safe=allow_less_safe)
    results: Mapping[str, Point] = {OFF: points[0], **levels}
    metadata = mask.metadata.model_copy(
        update={
            "levels": {name: _pair(point) for name, point in levels.items()},
            "method": {**method, **shared, "rule": RULE},
            "data_digests": {**mask.metadata.data_digests, "levels": data},
            "evaluation": {
                "prompts": source,
                "levels": {name: dict(point.metrics) for name, point in results.items()},
                "curve": [point.to_json() for point in points],
            },
        }
    )
    return replace(mask, metadata=metadata)


def _pair(point: Point) -> tuple[int, int]:
    return point.threshold.num_safety, point.threshold.num_utility
