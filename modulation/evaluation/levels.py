"""A modulated model in this process, answering and measured at safety levels.

Knows the modulator, answerers, metrics and perplexity. Knows nothing of files or printing.
"""

from collections.abc import Callable, Sequence

from transformers import PreTrainedTokenizerBase

from modulation.evaluation.answering import transformers_answerer
from modulation.evaluation.data import Record
from modulation.evaluation.metrics import Metrics, evaluate_answers
from modulation.evaluation.perplexity import perplexity
from modulation.evaluation.quality import Figures
from modulation.evaluation.run import AnswerAt, Measure, OnAnswer
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


def perplexity_in_process(
    modulator: Modulator, tokenizer: PreTrainedTokenizerBase, levels: SafetyLevels, batch_size: int
) -> Measure:
    """Perplexity of the right answers of benign prompts under the modulated model; left out without any."""

    def measure(level: str, records: Sequence[Record], _answers: Sequence[str]) -> Figures:
        with modulator.applied(levels.parse(level).threshold):
            found = perplexity(modulator.model, tokenizer, records, batch_size, kinds=("benign",))
        return Figures() if found is None else Figures(perplexity=found)

    return measure
