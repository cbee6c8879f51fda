"""Few-shot adaptation on the demo model: a dozen prompts of an attack family that nothing has seen.

Knows the corpus, masks and inner steps. A family's prompts are parted by topic: those adapted to are not
among those measured.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from modulation.demo.corpus import family_names, records
from modulation.demo.masking import Bench, examples
from modulation.demo.splits import all_records
from modulation.demo.topics import Split
from modulation.evaluation.data import Record
from modulation.evaluation.levels import metrics_at
from modulation.evaluation.metrics import Rate
from modulation.levels import SECURITY_CRITICAL
from modulation.masks import Mask
from modulation.modulator import Modulator
from modulation.tuning.drafting import untouched
from modulation.tuning.runs import AdaptationRun, adapt_mask

NUM_SHOTS: Final = 12
BORDERLINE_PER_TOPIC: Final = 4
OTHERS_PER_TOPIC: Final = 2


@dataclass(frozen=True)
class Adapted:
    """One family: ASR on its other prompts and over-refusal, before and after, by where it started."""

    family: str
    start: str
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
) -> list[Adapted]:
    """Every family of the split, from the learned factors and from factors of 1, at `security-critical`."""
    borderline = records("borderline", split, None, bench.seed, BORDERLINE_PER_TOPIC)
    found = []
    for family in families or family_names("harmful", split):
        shots, rest = _parted(records("harmful", split, family, bench.seed), bench.seed)
        for start, begun in (("learned", mask), ("from scratch", untouched(mask))):
            adapted = _adapted(bench, begun, shots, run)
            before, after = (_measured(bench, each, [*rest, *borderline]) for each in (begun, adapted))
            found.append(
                Adapted(
                    family, start, before["asr"], after["asr"], before["over_refusal"], after["over_refusal"]
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


def _adapted(bench: Bench, mask: Mask, shots: Sequence[Record], run: AdaptationRun) -> Mask:
    """On the shots alone for attacks; other kinds of prompts are of those that the mask saw."""
    known = all_records(bench.seed, OTHERS_PER_TOPIC)
    others = [each for each in known if each.kind != "harmful" or each.family is None]
    return adapt_mask(bench.model, bench.tokenizer, examples([*shots, *others]), mask, run)


def _measured(bench: Bench, mask: Mask, prompts: Sequence[Record]) -> Any:
    threshold = mask.levels.named[SECURITY_CRITICAL]
    return metrics_at(Modulator(bench.model, mask), bench.tokenizer, prompts, [threshold])[0]


def _count(rate: Rate) -> str:
    return f"{100 * rate['rate']:.1f} % ({rate['count']}/{rate['total']})"
