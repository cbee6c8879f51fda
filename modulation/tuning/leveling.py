"""Levels for a tuned mask: the sweep with a model, and what it leaves in the mask's metadata.

Knows the modulator, records and masks. Knows nothing of commands.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from transformers import PreTrainedTokenizerFast

from modulation.evaluation.answer_file import data_digest
from modulation.evaluation.data import Record
from modulation.evaluation.levels import metrics_at
from modulation.levels import OFF
from modulation.masks import Mask
from modulation.modulator import Modulator
from modulation.tuning.curve import RULE, Point, choose, grid, sweep

OnAnswered = Callable[[int], object]


def measured_points(
    modulator: Modulator,
    tokenizer: PreTrainedTokenizerFast,
    mask: Mask,
    records: Sequence[Record],
    on_answered: OnAnswered | None = None,
) -> list[Point]:
    """The curve: every threshold of the grid, answered greedily; `off` first."""
    return sweep(
        lambda threshold: metrics_at(modulator, tokenizer, records, [threshold], on_answered)[0],
        grid(mask.levels.maximum),
    )


def with_levels(
    mask: Mask, points: Sequence[Point], records: Sequence[Record], source: str, allow_less_safe: bool = False
) -> Mask:
    """The mask with the levels that the rule chooses, the rule, the curve and the results.

    Raises LevelError as `choose` does.
    """
    levels = choose(points, allow_less_safe=allow_less_safe)
    results: Mapping[str, Point] = {OFF: points[0], **levels}
    metadata = mask.metadata.model_copy(
        update={
            "levels": {name: _pair(point) for name, point in levels.items()},
            "method": {**mask.metadata.method, "rule": RULE},
            "data_digests": {**mask.metadata.data_digests, "levels": data_digest(records)},
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
