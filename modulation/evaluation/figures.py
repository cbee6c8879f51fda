"""All the figures of one threshold: answers are made, judged, and their text looked at.

Knows the modulator, answerers, judges and text quality. Knows nothing of files or printing.
"""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from modulation.evaluation.answering import Answerer
from modulation.evaluation.data import Record
from modulation.evaluation.judges import Judge, by_rule
from modulation.evaluation.metrics import count_verdicts
from modulation.evaluation.quality import Figures, perplexity, text_quality
from modulation.levels import Threshold
from modulation.modulator import Modulator


def figures_at(
    modulator: Modulator,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Record],
    threshold: Threshold,
    answer: Answerer,
    judge: Judge = by_rule,
    batch_size: int = 16,
) -> tuple[Figures, list[str]]:
    """Metrics, perplexity and text quality at one threshold, and the answers, one a record.

    `answer` must answer with `modulator.model`; `batch_size` is that of the perplexity.
    """
    with modulator.applied(threshold):
        answers = answer([record.prompt for record in records])
        likelihood = perplexity(modulator.model, tokenizer, records, batch_size=batch_size)
    verdicts = judge(records, answers, lambda _row, _verdict: None)
    figures = Figures(**count_verdicts(records, verdicts))  # type: ignore[typeddict-item]
    if likelihood is not None:
        figures["perplexity"] = likelihood
    if answers:
        quality = text_quality(answers)
        figures["repetition"], figures["length"] = quality["repetition"], quality["length"]
    return figures, answers
