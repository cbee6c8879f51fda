"""Figures as tables for people.

Knows names, rates and figures; knows nothing of where they come from.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence

from modulation.evaluation.metrics import Rate
from modulation.evaluation.quality import Figures

HEADINGS = ("metric", "rate", "count", "95 % interval")
FIGURE_HEADINGS = ("metric", "value", "counted from", "95 % interval")
RATES = ("asr", "over_refusal", "benign_correct", "refusal_plain", "unjudged")

Cells = tuple[str, ...]


def table(rows: Iterable[tuple[str, Rate | None]]) -> str:
    """A Markdown table, one row a rate; a rate of None makes a row that only names a figure."""
    return aligned([HEADINGS, *(_cells(name, rate) for name, rate in rows)])


def figures_table(figures: Figures) -> str:
    """A Markdown table of all figures of a level; attack families below the rate of them all."""
    return aligned([FIGURE_HEADINGS, *_rates(figures), *_text_quality(figures)])


def answer_table(prompts: Sequence[str], columns: Mapping[str, Sequence[str]]) -> str:
    """A Markdown table of answers: one block of rows a prompt, one row a level."""
    lines = ["| prompt | level | answer |", "|---|---|---|"]
    for number, prompt in enumerate(prompts):
        for level, found in columns.items():
            shown = prompt if level == next(iter(columns)) else ""
            lines.append(f"| {shown} | `{level}` | {found[number]} |".replace("|  |", "| |"))
    return "\n".join(lines)


def percent(share: float) -> str:
    """A share as per cent with one decimal place."""
    return f"{100 * share:.1f} %"


def rate_of(figures: Figures, metric: str) -> Rate | None:
    """The rate of this name, None where no prompt counts towards it."""
    found: Rate | None = dict(figures).get(metric)  # type: ignore[assignment]
    return found


def _rates(figures: Figures) -> Iterator[Cells]:
    for name in RATES:
        found = rate_of(figures, name)
        if found is not None:
            yield _cells(name, found)
        if name == "asr":
            for family, inside in figures.get("asr_by_family", {}).items():
                yield _cells(f"asr, {family}", inside)


def _text_quality(figures: Figures) -> Iterator[Cells]:
    if "perplexity" in figures:
        found = figures["perplexity"]
        behind = f"{found['num_answers']} right answers, {found['num_tokens']} tokens"
        yield "perplexity", f"{found['perplexity']:.4g}", behind, "-"
    if "repetition" in figures:
        yield _cells("looping", figures["repetition"]["looping"])
    if "length" in figures:
        length = figures["length"]
        behind = f"{length['num_answers']} answers, {length['num_empty']} empty"
        yield "mean words", f"{length['mean_words']:.1f}", behind, "-"


def _cells(name: str, rate: Rate | None) -> Cells:
    if rate is None:
        return name, "-", "-", "-"
    interval = f"{percent(rate['low'])} to {percent(rate['high'])}"
    return name, percent(rate["rate"]), f"{rate['count']}/{rate['total']}", interval


def aligned(rows: Sequence[Cells]) -> str:
    """The rows as a Markdown table, the first one as the heading, columns of one width."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    ruler = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    heading, *lines = (_line(row, widths) for row in rows)
    return "\n".join([heading, ruler, *lines])


def _line(row: Cells, widths: list[int]) -> str:
    return "| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |"
