"""The report's part on robustness: what is left of safety as its neurons are pruned.

Knows figures by level and count. Knows nothing of how neurons are pruned.
"""

from collections.abc import Sequence

from modulation.evaluation.html import plots
from modulation.evaluation.html.page import Html, element, figure, folded, joined, section, table
from modulation.evaluation.html.summary import RATES, WIDE_COLUMNS, rate_cell
from modulation.evaluation.rankings import SAFETY
from modulation.evaluation.report import rate_of
from modulation.evaluation.robustness import PrunedFigures


def pruning_section(points: Sequence[PrunedFigures]) -> Html:
    """A drawing of attack success, and a table of every rate that was measured."""
    lines = _lines(points)
    shown = [_rate_table(points, metric, label) for metric, label, _ in RATES]
    first, *others = [each for each in shown if each is not None] or [Html()]
    parts = [first, *([folded("Other rates as neurons are pruned", *others)] if others else [])]
    if lines:
        told = "; ".join(_in_words(line) for line in lines)
        caption = (
            "Solid: the top neurons of the safety set are pruned; dotted: as many random neurons of "
            "the same layers, outside both sets, at once. The bands are 95 % intervals of the solid lines."
        )
        parts.insert(0, figure(plots.pruning("pruning", f"{told}.", lines), caption))
    return section("Robustness to pruning", *parts)


def _lines(points: Sequence[PrunedFigures]) -> list[plots.Line]:
    found = []
    for level, pruned in dict.fromkeys((point["level"], point["pruned"]) for point in points):
        along = [
            (point["num_pruned"], plots.Interval.of(point["figures"]["asr"]))
            for point in points
            if (point["level"], point["pruned"]) == (level, pruned) and "asr" in point["figures"]
        ]
        if along:
            counts, values = zip(*along, strict=True)
            found.append(plots.Line(level, pruned != SAFETY, counts, values))
    return found


def _in_words(line: plots.Line) -> str:
    which = "random" if line.is_control else "safety"
    return (
        f"{line.name}: {line.values[0].value:.1f} % with {line.counts[0]} {which} neurons pruned, "
        f"{line.values[-1].value:.1f} % with {line.counts[-1]}"
    )


def _rate_table(points: Sequence[PrunedFigures], metric: str, label: str) -> Html | None:
    if not any(metric in point["figures"] for point in points):
        return None
    columns = list(dict.fromkeys((point["level"], point["pruned"]) for point in points))
    narrow = len(columns) > WIDE_COLUMNS
    cells: dict[tuple[str, str, int], Html] = {}
    for point in points:
        found = rate_of(point["figures"], metric)
        cells[point["level"], point["pruned"], point["num_pruned"]] = rate_cell(found, narrow=narrow)
    rows = [
        [str(count), *(cells.get((*column, count), rate_cell(None)) for column in columns)]
        for count in sorted({point["num_pruned"] for point in points})
    ]
    headings = [joined([element("code", level), element("small", pruned)]) for level, pruned in columns]
    title = f"{label[0].upper()}{label[1:]}, by level and by which neurons are pruned"
    return table(title, ["pruned", *headings], rows)
