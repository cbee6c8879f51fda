"""Answers laid in the model's mouth: a prompt's tokens followed by a given answer's.

Knows tokenizers, padding and log-probabilities. Knows nothing of neurons.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from modulation.attribution.base import Example
from modulation.errors import DataError

Answer = Literal["refusing", "complying"]
# Whether a model refuses shows in the first words of its answer.
NUM_MARGIN_TOKENS: Final = 4
WHOLE: Final = 0


@dataclass(frozen=True, slots=True)
class Forced:
    """A prompt's tokens and, from `start` on, those of an answer (none where only the prompt counts)."""

    tokens: tuple[int, ...]
    start: int


@dataclass(frozen=True, slots=True)
class Both:
    """One prompt with the answer that refuses and with the one that complies."""

    refusing: Forced
    complying: Forced


@dataclass(frozen=True, slots=True)
class Parting:
    """Where the refusing answer parts from the complying one: the place in the answer (0 first), and the
    token that each has there."""

    place: int
    refusing: int
    complying: int


class Forcing:
    """Examples to tokens for one model, within its context."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        self._context: int | None = getattr(model.config, "max_position_embeddings", None)

    def prompts(self, examples: Iterable[Example]) -> list[Forced]:
        """The prompts alone, shortest first."""
        return _shortest_first(self._forced(each, None, WHOLE) for each in examples)

    def refusing(self, examples: Iterable[Example], num_tokens: int) -> list[Forced]:
        """Prompts with the refusing answers' first `num_tokens` tokens (0: all), shortest first."""
        return _shortest_first(self._forced(each, each.refusing, num_tokens) for each in examples)

    def complying(self, examples: Iterable[Example], num_tokens: int) -> list[Forced]:
        """Prompts with the complying answers' first `num_tokens` tokens (0: all), shortest first."""
        return _shortest_first(self._forced(each, each.complying, num_tokens) for each in examples)

    def both(self, examples: Iterable[Example], num_tokens: int) -> list[Both]:
        """Prompts with both answers' first `num_tokens` tokens (0: all), shortest first."""
        found = [
            Both(
                self._forced(each, each.refusing, num_tokens), self._forced(each, each.complying, num_tokens)
            )
            for each in examples
        ]
        return sorted(found, key=lambda each: len(each.refusing.tokens))

    def parting(self, example: Example, answer: Answer) -> tuple[Forced, Parting]:
        """The prompt with one of its answers, whole, and where the two answers part.

        Raises DataError where one answer begins with the whole other one.
        """
        refusing = self._forced(example, example.refusing, WHOLE)
        complying = self._forced(example, example.complying, WHOLE)
        start = complying.start
        pairs = zip(refusing.tokens[start:], complying.tokens[start:], strict=False)
        for place, (refuses, complies) in enumerate(pairs):
            if refuses != complies:
                forced = refusing if answer == "refusing" else complying
                return forced, Parting(place, refuses, complies)
        raise DataError(
            f"Record {example.name!r}: its answer {example.complying!r} and the refusal {example.refusing!r} "
            "do not part: one begins with the other. Give another answer or another --refusal."
        )

    def _forced(self, example: Example, answer: str | None, num_tokens: int) -> Forced:
        """Raises DataError for an answer without tokens and for what the model's context cannot hold."""
        turns = [{"role": "user", "content": example.prompt}]
        text = self._tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        head = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        tail: list[int] = []
        if answer is not None:
            tail = self._tokenizer(answer, add_special_tokens=False)["input_ids"][: num_tokens or None]
            if not tail:
                raise DataError(f"Record {example.name!r}: its answer {answer!r} holds no tokens.")
        length = len(head) + len(tail)
        if self._context is not None and length > self._context:
            raise DataError(
                f"Record {example.name!r}: prompt and answer are {length} tokens, the model's context holds "
                f"{self._context}; shorten the prompt or leave the record out."
            )
        return Forced((*head, *tail), len(head))


def _shortest_first(found: Iterable[Forced]) -> list[Forced]:
    """Batches of like lengths hold little padding; the sort is stable, so the order is always the same."""
    return sorted(found, key=lambda each: len(each.tokens))


def padded(batch: Sequence[Forced], device: torch.device) -> tuple[Tensor, Tensor]:
    """Right-padded tokens (rows, tokens) and which of them predict an answer's token, bool, same shape.

    Padding stands after every token that counts, where causal attention cannot see it. Without an answer
    it is the prompt's last token that counts, which predicts the answer's first.
    """
    width = max(len(each.tokens) for each in batch)
    tokens = torch.zeros(len(batch), width, dtype=torch.int64)
    answers = torch.zeros(len(batch), width, dtype=torch.bool)
    for row, each in enumerate(batch):
        # Padded with the row's own last token: transformers warns of padding tokens without a mask.
        tokens[row] = each.tokens[-1]
        tokens[row, : len(each.tokens)] = torch.tensor(each.tokens)
        answers[row, each.start - 1 : max(each.start, len(each.tokens) - 1)] = True
    return tokens.to(device), answers.to(device)


@dataclass(frozen=True, slots=True)
class AnswerTokens:
    """Every answer token of a batch, one entry each: its row, its place in the answer (0 first), the
    log-probabilities of all tokens there, float32 (tokens, vocabulary), and that of the token itself."""

    rows: Tensor
    places: Tensor
    predicted: Tensor
    chosen: Tensor


def answer_tokens(model: PreTrainedModel, batch: Sequence[Forced]) -> AnswerTokens:
    """One forward pass of the prompts with their answers; differentiable."""
    tokens, answers = padded(batch, model.device)
    # Logits are large (tokens x vocabulary): only where an answer is predicted are they computed.
    columns = answers.any(dim=0).nonzero().squeeze(1)
    logits = model(tokens, use_cache=False, logits_to_keep=columns).logits
    rows, places = answers[:, columns].nonzero(as_tuple=True)
    predicted = logits[rows, places].float().log_softmax(-1)
    at = columns[places]
    chosen = predicted.gather(1, tokens[rows, at + 1][:, None]).squeeze(1)
    starts = torch.tensor([each.start for each in batch], device=at.device)
    return AnswerTokens(rows, at + 1 - starts[rows], predicted, chosen)


def answer_log_probability(model: PreTrainedModel, batch: Sequence[Forced]) -> Tensor:
    """Log-probability of each answer after its prompt, summed over its tokens: float32 (rows,)."""
    found = answer_tokens(model, batch)
    return torch.zeros(len(batch), device=found.chosen.device).index_add(0, found.rows, found.chosen)


def answer_log_odds(model: PreTrainedModel, batch: Sequence[Forced]) -> Tensor:
    """Log-odds of each answer's tokens, log p / (1 - p), their mean: float32 (rows,).

    Where a model is sure, the log-probability hardly moves until a word breaks; the log-odds do.
    """
    found = answer_tokens(model, batch)
    targets = torch.cat([torch.tensor(each.tokens[each.start :]) for each in batch]).to(found.rows.device)
    others = found.predicted.scatter(1, targets[:, None], -torch.inf).logsumexp(dim=1)
    zeros = torch.zeros(len(batch), device=found.chosen.device)
    sums = zeros.index_add(0, found.rows, found.chosen - others)
    return sums / zeros.index_add(0, found.rows, torch.ones_like(found.chosen))
