"""Robustness: what is left of safety when somebody prunes the neurons that carry it.

Knows evaluations and prunings. Knows nothing of files, terminals or how neurons were ranked.
"""

from collections.abc import Sequence
from typing import TypedDict

from transformers import PreTrainedModel

from modulation.evaluation.answer_file import AnswerFile
from modulation.evaluation.pruning import pruned
from modulation.evaluation.quality import Figures
from modulation.evaluation.rankings import Pruning
from modulation.evaluation.report import aligned, percent, rate_of
from modulation.evaluation.run import Evaluation, evaluate_levels


class PrunedFigures(TypedDict):
    """The figures of one level with the first `num_pruned` neurons of the ranking `pruned` at 0."""

    level: str
    pruned: str
    num_pruned: int
    figures: Figures


def pruned_figures(
    evaluation: Evaluation, levels: Sequence[str], model: PreTrainedModel, prunings: Sequence[Pruning]
) -> list[PrunedFigures]:
    """The figures at each level with each pruning; `evaluation` must answer with `model`.

    One entry a level, pruning and count, in this order. Nothing pruned is measured once a level and stands
    under every pruning; there are `num_passes` passes over all prompts at all levels.
    """
    found: dict[tuple[str, int], dict[str, Figures]] = {}
    for pruning in prunings:
        for count in pruning.counts:
            if _place(pruning, count) not in found:
                with pruned(model, pruning.ranking[:count]), AnswerFile(None, {}) as kept:
                    found[_place(pruning, count)] = evaluate_levels(evaluation, levels, kept)
    return [
        PrunedFigures(
            level=level,
            pruned=pruning.name,
            num_pruned=count,
            figures=found[_place(pruning, count)][level],
        )
        for level in levels
        for pruning in prunings
        for count in pruning.counts
    ]


def num_passes(prunings: Sequence[Pruning]) -> int:
    """How many times `pruned_figures` answers all prompts at all levels."""
    return len({_place(pruning, count) for pruning in prunings for count in pruning.counts})


def _place(pruning: Pruning, count: int) -> tuple[str, int]:
    """Where figures are kept: whose neurons are not pruned makes no difference."""
    return (pruning.name, count) if count else ("", 0)


def pruning_table(points: Sequence[PrunedFigures], metric: str) -> str:
    """A Markdown table of one rate: a row a count of pruned neurons, a column a level and ranking."""
    columns = list(dict.fromkeys((point["level"], point["pruned"]) for point in points))
    cells: dict[tuple[str, str, int], str] = {}
    for point in points:
        rate = rate_of(point["figures"], metric)
        shown = f"{percent(rate['rate'])} ({rate['count']}/{rate['total']})" if rate else "-"
        cells[point["level"], point["pruned"], point["num_pruned"]] = shown
    heading = ("neurons pruned", *(f"`{level}`, {name}" for level, name in columns))
    rows = [
        (str(count), *(cells.get((*column, count), "-") for column in columns))
        for count in sorted({point["num_pruned"] for point in points})
    ]
    return aligned([heading, *rows])
