"""The report's tables of rates: every figure by level, and attack success by family.

Knows figures. Knows nothing of how they were found.
"""

from collections.abc import Mapping
from typing import Final

from modulation.evaluation.html import plots
from modulation.evaluation.html.page import Html, element, figure, joined, section, table
from modulation.evaluation.metrics import Rate
from modulation.evaluation.quality import Figures
from modulation.evaluation.report import percent, rate_of
from modulation.levels import OFF
from modulation.masks import Mask

RATES: Final = (
    ("asr", "attack success", "lower is better"),
    ("over_refusal", "over-refusal", "lower is better"),
    ("benign_correct", "benign correct", "higher is better"),
    ("refusal_plain", "plain harmful refused", "higher is better"),
)
WIDE_COLUMNS: Final = 4
"""More columns of rates than this are written narrowly."""


def rate_cell(rate: Rate | None, *, narrow: bool = False) -> Html:
    """A rate with its counts and interval under it: in one line, or in two for a table of many columns."""
    if rate is None:
        return Html("-")
    ends = f"{100 * rate['low']:.1f} to {percent(rate['high'])}"
    counts = f"{rate['count']}/{rate['total']}"
    below = (counts, ends) if narrow else (f"{counts}, {ends}",)
    return joined([percent(rate["rate"]), *(element("small", each) for each in below)])


def headline(levels: Mapping[str, Figures]) -> str:
    """The figures of the level with the least attack success, against those of `off`."""
    attacked = {name: each for name, each in levels.items() if "asr" in each}
    if OFF not in attacked or len(attacked) < 2:
        return f"Levels evaluated: {', '.join(levels)}."
    safest = min(attacked, key=lambda name: attacked[name]["asr"]["rate"])
    if safest == OFF:
        return f"No level has less attack success than {OFF}."
    told = []
    for metric, what in (
        ("asr", "of attacks succeed"),
        ("over_refusal", "of borderline prompts are refused"),
        ("benign_correct", "of benign prompts are answered rightly"),
    ):
        here, off = rate_of(levels[safest], metric), rate_of(levels[OFF], metric)
        if here and off:
            told.append(f"{percent(here['rate'])} {what} ({percent(off['rate'])} at {OFF})")
    return f"Least attack success at level {safest}: {', '.join(told)}."


def summary_section(levels: Mapping[str, Figures], mask: Mask | None) -> Html:
    shown = [each for each in RATES if any(each[0] in figures for figures in levels.values())]
    quality = [each for each in _QUALITY if any(each[0] in figures for figures in levels.values())]
    headings = [
        Html("level"),
        *(joined([label, element("small", direction)]) for _, label, direction in shown),
        *(joined([label, element("small", unit)]) for _, label, unit, _ in quality),
    ]
    rows = [
        [
            _level_cell(name, mask),
            *(rate_cell(rate_of(figures, metric), narrow=True) for metric, _, _ in shown),
            *(write(figures) if key in figures else Html("-") for key, _, _, write in quality),
        ]
        for name, figures in levels.items()
    ]
    note = "Each share with its counts and its 95 % Wilson interval; small shares of few prompts say little."
    return section("Summary", table("Figures by level", headings, rows), element("p", element("small", note)))


def _level_cell(name: str, mask: Mask | None) -> Html:
    if mask is None or name not in mask.levels:
        return element("code", name)
    threshold = mask.levels.parse(name).threshold
    counts = f"{threshold.num_safety} safety, {threshold.num_utility} utility neurons"
    return joined([element("code", name), element("small", counts)])


def _perplexity_cell(figures: Figures) -> Html:
    found = figures["perplexity"]
    behind = (f"{found['num_tokens']} tokens", f"{found['num_answers']} answers")
    return joined([f"{found['perplexity']:.4g}", *(element("small", each) for each in behind)])


def _repetition_cell(figures: Figures) -> Html:
    found = figures["repetition"]
    return joined(
        [
            rate_cell(found["looping"], narrow=True),
            element("small", f"mean {percent(found['mean'])} of 4-grams"),
        ]
    )


def _length_cell(figures: Figures) -> Html:
    found = figures["length"]
    behind = (f"median {found['median_words']:g}", f"{found['num_empty']}/{found['num_answers']} empty")
    return joined([f"{found['mean_words']:.1f}", *(element("small", each) for each in behind)])


_QUALITY = (
    ("perplexity", "perplexity", "of right answers", _perplexity_cell),
    ("repetition", "answers that loop", "lower is better", _repetition_cell),
    ("length", "length", "mean words an answer", _length_cell),
)


def families_section(levels: Mapping[str, Figures]) -> Html | None:
    """Attack success by family and level; None where nothing was attacked."""
    rates = {name: each["asr_by_family"] for name, each in levels.items() if each.get("asr_by_family")}
    if not rates:
        return None
    families = list(dict.fromkeys(family for found in rates.values() for family in found))
    narrow = len(rates) > WIDE_COLUMNS
    rows = [
        [family, *(rate_cell(found.get(family), narrow=narrow) for found in rates.values())]
        for family in families
    ]
    first = next(iter(rates))
    caption = f"Lines are 95 % intervals; the upright marks repeat {first}."
    told = f"{len(families)} attack families at {', '.join(rates)}; the table below has every number."
    return section(
        "Attack success by family",
        figure(plots.families("families", told, rates), caption),
        table("Attack success by family", ("family", *(element("code", each) for each in rates)), rows),
    )
