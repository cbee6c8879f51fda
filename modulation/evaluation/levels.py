"""Answer one set of prompts at several safety levels, and count at each.

Knows the modulator, answerers and metrics. Knows nothing of files or printing.
"""

from collections.abc import Callable, Sequence

from transformers import PreTrainedTokenizerBase

from modulation.evaluation.answering import transformers_answerer
from modulation.evaluation.data import Record
from modulation.evaluation.metrics import Metrics, evaluate_answers
from modulation.evaluation.run import AnswerAt, OnAnswer
from modulation.levels import SafetyLevels, Threshold
from modulation.modulator import Modulator


def metrics_at(
    modulator: Modulator,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Record],
    thresholds: Sequence[Threshold],
    on_answered: Callable[[int], object] | None = None,
    max_new_tokens: int = 64,
) -> list[Metrics]:
    """The metrics of `records`, answered greedily at each threshold, in their order.

    `on_answered` is told after each batch how many prompts it held.
    """
    answer = transformers_answerer(
        modulator.model, tokenizer, max_new_tokens=max_new_tokens, on_answered=on_answered
    )
    found = []
    for threshold in thresholds:
        with modulator.applied(threshold):
            answers = answer([record.prompt for record in records])
        found.append(evaluate_answers(records, answers))
    return found


def answering_in_process(
    modulator: Modulator,
    tokenizer: PreTrainedTokenizerBase,
    levels: SafetyLevels,
    max_new_tokens: int,
    batch_size: int,
) -> AnswerAt:
    """Greedy answers of the modulated model, at levels by name or number."""

    def answer_at(level: str, prompts: Sequence[str], on_answer: OnAnswer) -> None:
        answer = transformers_answerer(
            modulator.model, tokenizer, max_new_tokens, batch_size, on_answer=on_answer
        )
        with modulator.applied(levels.parse(level).threshold):
            answer(list(prompts))

    return answer_at
