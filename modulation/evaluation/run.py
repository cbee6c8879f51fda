"""An evaluation: every prompt answered and judged at every level, whatever answers and whatever judges.

Knows the order of things and what need not be done again. Knows no model, no server and no terminal.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from modulation.errors import DataError
from modulation.evaluation.answer_file import Answered, AnswerFile
from modulation.evaluation.data import Record
from modulation.evaluation.judges import RULE, Judge, Verdict, by_rule
from modulation.evaluation.metrics import count_verdicts
from modulation.evaluation.quality import Figures

OnAnswer = Callable[[int, str], object]
"""Told the row of a prompt and its answer, as soon as it is there, in any order."""

AnswerAt = Callable[[str, Sequence[str], OnAnswer], object]
"""A level's name and prompts: answers every prompt at that level, and tells each answer."""

Measure = Callable[[str, Sequence[Record], Sequence[str]], Figures]
"""A level's name, records and their answers to further figures of that level."""


@dataclass(frozen=True)
class Evaluation:
    """What is asked, how it is judged, and what else is measured; `judge_name` tells judges apart.

    `on_done` is told 1 for every new answer, and for every new verdict of a judge that is not the rule.
    """

    records: Sequence[Record]
    answer_at: AnswerAt
    judge: Judge = by_rule
    judge_name: str = RULE
    measures: Sequence[Measure] = ()
    on_done: Callable[[int], object] = lambda _number: None


def evaluate_levels(evaluation: Evaluation, levels: Sequence[str], kept: AnswerFile) -> dict[str, Figures]:
    """The figures at each level, by name. What `kept` knows is not asked again.

    Raises DataError where the judge gave no verdict on any answer of a level.
    """
    found: dict[str, Figures] = {}
    for level in levels:
        answers = _answers(evaluation, level, kept)
        verdicts = _verdicts(evaluation, level, kept)
        if all(verdict is None for verdict in verdicts):
            raise DataError(
                f"The judge {evaluation.judge_name} gave no verdict on any of the {len(verdicts)} answers "
                f"at level {level!r}. Use another --judge-model, or another --judge-prompt."
            )
        found[level] = Figures(**count_verdicts(evaluation.records, verdicts))  # type: ignore[typeddict-item]
        for measure in evaluation.measures:
            found[level].update(measure(level, evaluation.records, answers))
    kept.finish(evaluation.records)
    return found


def _answers(evaluation: Evaluation, level: str, kept: AnswerFile) -> list[str]:
    pending = [record for record in evaluation.records if kept.get(level, record) is None]

    def keep(row: int, answer: str) -> None:
        kept.put(level, pending[row], Answered(answer))
        evaluation.on_done(1)

    if pending:
        evaluation.answer_at(level, [record.prompt for record in pending], keep)
    return [kept.known(level, record).answer for record in evaluation.records]


def _verdicts(evaluation: Evaluation, level: str, kept: AnswerFile) -> list[Verdict | None]:
    """Verdicts by rule are always made anew: they cost nothing, and the rule may have changed."""
    name = evaluation.judge_name
    pending = [r for r in evaluation.records if name == RULE or kept.known(level, r).judge != name]
    answers = [kept.known(level, record).answer for record in pending]

    def keep(row: int, verdict: Verdict | None) -> None:
        kept.put(level, pending[row], Answered(answers[row], name, verdict))
        if name != RULE:
            evaluation.on_done(1)

    if pending:
        evaluation.judge(pending, answers, keep)
    return [kept.known(level, record).verdict for record in evaluation.records]
