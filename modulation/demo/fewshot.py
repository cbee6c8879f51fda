"""Few-shot adaptation on the demo model: a dozen prompts of an attack family that nothing has seen.

Knows the corpus, masks and adaptation. A family's prompts are parted by topic: those adapted to are not among
those measured. The other prompts that adaptation is given are of those that the mask was learned from: of the
`tune` split, whose validation part is measured on, those of its learning part.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from modulation.demo.corpus import family_names, records
from modulation.demo.masking import TUNING_PROMPTS_PER_TOPIC, Bench, examples
from modulation.demo.splits import (
    VALIDATION_FAMILIES,
    all_records,
    learning_records,
    validation_records,
)
from modulation.demo.topics import Split
from modulation.evaluation.data import Record
from modulation.evaluation.levels import metrics_at
from modulation.evaluation.metrics import Rate
from modulation.levels import SECURITY_CRITICAL, Threshold
from modulation.masks import Mask
from modulation.modulator import Modulator
from modulation.tuning.drafting import untouched
from modulation.tuning.runs import AdaptationRun, adapt_mask

NUM_SHOTS: Final = 12
BORDERLINE_PER_TOPIC: Final = 4
BORDERLINE_PER_VALIDATION_TOPIC: Final = 16
OTHERS_PER_KIND: Final = 180
"""Plain harmful, borderline and benign prompts that are given beside the dozen."""


@dataclass(frozen=True)
class Adapted:
    """One family: ASR on its other prompts and over-refusal, before and after, by where it started, measured
    at a named level."""

    family: str
    start: str
    level: str
    asr_before: Rate
    asr_after: Rate
    over_refusal_before: Rate
    over_refusal_after: Rate


def adaptations(
    bench: Bench,
    mask: Mask,
    split: Split,
    run: AdaptationRun,
    families: Sequence[str] | None = None,
    on_done: Callable[[str], object] = lambda _family: None,
    level: str = SECURITY_CRITICAL,
) -> list[Adapted]:
    """Every family of the split, from the learned factors and from factors of 1, measured at a named level of
    the mask. Of the `tune` split only the validation families are new, to a mask that choices are made by."""
    threshold = mask.levels.named[level]
    borderline = _borderline(split, bench.seed)
    others = _others(split, bench.seed)
    every = VALIDATION_FAMILIES if split == "tune" else family_names("harmful", split)
    found = []
    for family in families or every:
        shots, rest = _parted(records("harmful", split, family, bench.seed), bench.seed)
        for start, begun in (("learned", mask), ("from scratch", untouched(mask))):
            adapted = _adapted(bench, begun, [*shots, *others], run)
            before, after = (
                _measured(bench, each, threshold, [*rest, *borderline]) for each in (begun, adapted)
            )
            found.append(
                Adapted(
                    family,
                    start,
                    level,
                    asr_before=before["asr"],
                    asr_after=after["asr"],
                    over_refusal_before=before["over_refusal"],
                    over_refusal_after=after["over_refusal"],
                )
            )
        on_done(family)
    return found


def adaptation_table(runs: Sequence[Adapted]) -> str:
    """A Markdown table, one row a family and start."""
    lines = [
        "| family | start | ASR before | after | over-refusal before | after |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {each.family} | {each.start} | {_count(each.asr_before)} | {_count(each.asr_after)} | "
        f"{_count(each.over_refusal_before)} | {_count(each.over_refusal_after)} |"
        for each in runs
    ]
    return "\n".join(lines)


def _parted(found: list[Record], seed: int) -> tuple[list[Record], list[Record]]:
    chosen = set(random.Random(seed).sample(range(len(found)), NUM_SHOTS))
    return (
        [each for row, each in enumerate(found) if row in chosen],
        [each for row, each in enumerate(found) if row not in chosen],
    )


def _borderline(split: Split, seed: int) -> list[Record]:
    """Those that over-refusal is measured on: their topics are in nothing that adaptation is given."""
    if split != "tune":
        return records("borderline", split, None, seed, BORDERLINE_PER_TOPIC)
    found = validation_records(seed, BORDERLINE_PER_VALIDATION_TOPIC)
    return [each for each in found if each.kind == "borderline"]


def _others(split: Split, seed: int) -> list[Record]:
    known = learning_records if split == "tune" else all_records
    found = [
        each
        for each in known(seed, TUNING_PROMPTS_PER_TOPIC)
        if each.kind != "harmful" or each.family is None
    ]
    source = random.Random(seed)
    chosen = []
    for kind in ("harmful", "borderline", "benign"):
        pool = [each for each in found if each.kind == kind]
        chosen += source.sample(pool, min(OTHERS_PER_KIND, len(pool)))
    return chosen


def _adapted(bench: Bench, mask: Mask, given: Sequence[Record], run: AdaptationRun) -> Mask:
    return adapt_mask(bench.model, bench.tokenizer, examples(given), mask, run)


def _measured(bench: Bench, mask: Mask, threshold: Threshold, prompts: Sequence[Record]) -> Any:
    return metrics_at(Modulator(bench.model, mask), bench.tokenizer, prompts, [threshold])[0]


def _count(rate: Rate) -> str:
    return f"{100 * rate['rate']:.1f} % ({rate['count']}/{rate['total']})"
