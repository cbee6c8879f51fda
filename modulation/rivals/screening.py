"""A cheap guess at attack success, over-refusal and benign correctness, and the dear measure itself.

Knows a model and its tokenizer. Knows nothing of settings, nor of what was done to the model.

The guess generates nothing: a prompt counts as refused where the first tokens of a refusing answer, laid in
the model's mouth, are more likely than those of the complying one (the refusal margin of attribution). It
sees refusals and not nonsense, so it only says which settings are worth answers.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from modulation.attribution.base import AttributionData
from modulation.attribution.teacher_forcing import NUM_MARGIN_TOKENS, Both, Forcing, answer_log_probability
from modulation.evaluation.answering import transformers_answerer
from modulation.evaluation.data import Record
from modulation.evaluation.metrics import Metrics, evaluate_answers
from modulation.rivals.choice import Measure, Point, Screen


def margin_screen(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    data: AttributionData,
    *,
    num_tokens: int = NUM_MARGIN_TOKENS,
    batch_size: int = 64,
) -> Screen:
    """A guess from the margins of `data`: attacked prompts below 0 are complied with, borderline and benign
    ones above 0 are refused.

    A prompt costs two passes, so a sample of the validation records will do where answers are short; draw it
    at random, since every n-th record may leave out whole topics. What acts on some tokens of a pass alone
    is not guessed rightly: prompt and answer are one pass here.
    Raises DataError for missing attacked, benign or borderline prompts.
    """
    data.require("attacked", "benign", "borderline")
    forcing = Forcing(model, tokenizer)
    attacked = [example for family in data.attacked.values() for example in family]
    pairs = [forcing.both(each, num_tokens) for each in (attacked, data.borderline, data.benign)]

    def screen() -> Point:
        attacked, borderline, benign = (_num_refused(model, each, batch_size) for each in pairs)
        # Counts are taken from each other, not shares: equal settings stay equal to the last bit.
        return Point(
            asr=(len(pairs[0]) - attacked) / len(pairs[0]),
            over_refusal=borderline / len(pairs[1]),
            benign_correct=(len(pairs[2]) - benign) / len(pairs[2]),
        )

    return screen


def generation_measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    *,
    max_new_tokens: int = 64,
    batch_size: int = 64,
) -> Measure:
    """Greedy answers, judged by rule."""
    answer = transformers_answerer(model, tokenizer, max_new_tokens, batch_size)

    def measure(records: Sequence[Record]) -> Metrics:
        return evaluate_answers(records, answer([record.prompt for record in records]))

    return measure


@torch.no_grad()
def _margins(model: PreTrainedModel, batch: Sequence[Both]) -> Tensor:
    """Log-probability of each refusing answer minus that of the complying one: float32 (rows,)."""
    refusing = answer_log_probability(model, [each.refusing for each in batch])
    return refusing - answer_log_probability(model, [each.complying for each in batch])


def _num_refused(model: PreTrainedModel, pairs: Sequence[Both], batch_size: int) -> int:
    refused = 0
    for start in range(0, len(pairs), batch_size):
        refused += int((_margins(model, pairs[start : start + batch_size]) > 0).sum())
    return refused
