"""Text quality: how likely the right answers are, how often answers loop, how long they are.

Knows a model's log-probabilities, and texts. Knows nothing of verdicts, levels or neurons: inside
`Modulator.applied(threshold)` the figures are those of the modulated model.
"""

import math
import re
import statistics
from collections.abc import Callable, Sequence
from typing import Final, TypedDict

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modulation.errors import ModelError
from modulation.evaluation.data import Record
from modulation.evaluation.metrics import Metrics, Rate, rate

NGRAM_LENGTH: Final = 4
LARGEST_REPEATED_SHARE: Final = 0.2
"""An answer loops when more than this share of its 4-grams stood in it before. The limit is ours."""

_UNIT: Final = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+|[^\w\s]")
"""Words, single punctuation marks ("!!!!" is a loop too), single Chinese and Japanese characters."""

_SENTINEL: Final = "the-answer-stands-here"


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


def perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Record],
    batch_size: int = 16,
    on_done: Callable[[int], object] | None = None,
    kinds: Sequence[str] = ("benign", "borderline"),
) -> Perplexity | None:
    """Perplexity of the right answers of records of these kinds, teacher-forced.

    exp of the mean negative log-likelihood (nats, float32) over all answer tokens together, each
    answer's end-of-turn token among them; the prompt's tokens condition and are not counted. None where
    no such record carries an answer. `on_done` is told after each batch how many answers it held.

    Source: Jelinek et al. 1977; per token, so it compares models of one tokenizer only.
    Raises ModelError for a tokenizer without an end-of-turn token.
    """
    pairs = right_answers(records, kinds)
    if not pairs:
        return None
    end = end_of_turn(tokenizer)
    rows = sorted((_encoded(tokenizer, *pair, end) for pair in pairs), key=lambda row: len(row[0]))
    total, num_tokens = 0.0, 0
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        log_probabilities = _answer_log_probabilities(model, batch)
        total -= log_probabilities.double().sum().item()
        num_tokens += len(log_probabilities)
        if on_done:
            on_done(len(batch))
    return Perplexity(perplexity=_exp(total / num_tokens), num_tokens=num_tokens, num_answers=len(pairs))


def right_answers(records: Sequence[Record], kinds: Sequence[str]) -> list[tuple[str, str]]:
    """(prompt, answer) of records of these kinds that carry an answer. A harmful record's answer complies,
    so it is not a right one: asking for that kind is a mistake of ours."""
    assert "harmful" not in kinds, kinds
    return [(r.prompt, r.answer) for r in records if r.kind in kinds and r.answer is not None]


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that ends an assistant's turn: the first special one that the chat template puts after
    an answer, else the tokenizer's end-of-sequence token. Raises ModelError where there is neither."""
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _SENTINEL}]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    assert isinstance(text, str), type(text)
    after = text[text.rindex(_SENTINEL) + len(_SENTINEL) :]
    special = {*tokenizer.all_special_ids} | {
        number for number, token in tokenizer.added_tokens_decoder.items() if token.special
    }
    for token in tokenizer(after, add_special_tokens=False)["input_ids"]:
        if token in special:
            return int(token)
    if isinstance(tokenizer.eos_token_id, int):
        return tokenizer.eos_token_id
    raise ModelError(
        f"Tokenizer {tokenizer.name_or_path!r} has no end-of-turn token: its chat template puts no special "
        "token after an answer, and it has no eos_token. Perplexity needs one: set eos_token."
    )


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


def _encoded(tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str, end: int) -> tuple[list[int], int]:
    """Tokens of the prompt, the answer and the end of the turn, and where the answer starts."""
    turns = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    head = tokenizer(text, add_special_tokens=False)["input_ids"]
    return [*head, *tokenizer(answer, add_special_tokens=False)["input_ids"], end], len(head)


def _answer_log_probabilities(model: PreTrainedModel, batch: Sequence[tuple[list[int], int]]) -> Tensor:
    """Log-probability of every answer token of the batch: float32 (answer tokens,).

    Padding stands after every token that counts, where causal attention cannot see it.
    """
    width = max(len(ids) for ids, _ in batch)
    tokens = torch.zeros(len(batch), width, dtype=torch.int64)
    predicts = torch.zeros(len(batch), width, dtype=torch.bool)
    for row, (ids, start) in enumerate(batch):
        tokens[row, : len(ids)] = torch.tensor(ids)
        predicts[row, start - 1 : len(ids) - 1] = True
    tokens, predicts = tokens.to(model.device), predicts.to(model.device)
    with torch.inference_mode():
        logits = model(tokens, use_cache=False).logits[predicts].float()  # (answer tokens, vocabulary)
        wanted = tokens.roll(-1, dims=1)[predicts]
        found: Tensor = logits.log_softmax(-1).gather(-1, wanted[:, None]).squeeze(-1)
    return found


def _exp(nats: float) -> float:
    try:
        return math.exp(nats)
    except OverflowError:  # a model whose logits are broken beyond measure
        return math.inf
