"""Text quality: how often answers loop, how long they are, and the form of every figure of a level.

Knows texts. Knows nothing of models, verdicts, levels or neurons.
"""

import re
import statistics
from collections.abc import Sequence
from typing import Final, TypedDict

from modulation.evaluation.metrics import Metrics, Rate, rate

NGRAM_LENGTH: Final = 4
LARGEST_REPEATED_SHARE: Final = 0.2
"""An answer loops when more than this share of its 4-grams stood in it before. The limit is ours."""

_UNIT: Final = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+|[^\w\s]")
"""Words, single punctuation marks ("!!!!" is a loop too), single Chinese and Japanese characters."""


class Perplexity(TypedDict):
    """`num_tokens` of `num_answers` answers, end-of-turn tokens among them, are behind `perplexity`."""

    perplexity: float
    num_tokens: int
    num_answers: int


class Repetition(TypedDict):
    """`looping`: share of answers that loop; `mean`: mean share of repeated 4-grams, from 0 to 1."""

    looping: Rate
    mean: float


class Length(TypedDict):
    """Words an answer, marks not counted; `num_empty` answers hold no word at all."""

    mean_words: float
    median_words: float
    num_empty: int
    num_answers: int


class TextQuality(TypedDict):
    """What the texts of answers tell without a model."""

    repetition: Repetition
    length: Length


class Figures(Metrics, total=False):
    """Everything measured at one level. A figure is left out where nothing counts towards it."""

    perplexity: Perplexity
    repetition: Repetition
    length: Length


def text_quality(answers: Sequence[str]) -> TextQuality:
    """Repetition and length of answers, wherever they came from. Refusals are short and alike, so compare
    these figures between levels with over-refusal in mind.

    Raises ValueError when there are no answers.
    """
    shares = [repeated_share(answer) for answer in answers]
    lengths = [sum(unit[0].isalnum() or unit[0] == "_" for unit in _units(answer)) for answer in answers]
    looping = rate(share > LARGEST_REPEATED_SHARE for share in shares)
    return TextQuality(
        repetition=Repetition(looping=looping, mean=statistics.fmean(shares)),
        length=Length(
            mean_words=statistics.fmean(lengths),
            median_words=float(statistics.median(lengths)),
            num_empty=lengths.count(0),
            num_answers=len(lengths),
        ),
    )


def repeated_share(answer: str) -> float:
    """Share of an answer's 4-grams that stood in it before, 0 (none) to 1; 0 for fewer than four units.

    1 - distinct 4-grams / 4-grams: seq-rep-4 of Welleck et al. (arXiv 1908.04319, section 6), over lower-case
    words and punctuation marks in place of tokens, so that it needs no tokenizer.
    """
    units = _units(answer)
    ngrams = [tuple(units[start : start + NGRAM_LENGTH]) for start in range(len(units) - NGRAM_LENGTH + 1)]
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def _units(answer: str) -> list[str]:
    return _UNIT.findall(answer.lower())
