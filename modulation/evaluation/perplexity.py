"""How likely a model finds the right answers.

Knows a model's log-probabilities. Knows nothing of verdicts, levels or neurons: inside
`Modulator.applied(threshold)` the perplexity is that of the modulated model.
"""

import math
from collections.abc import Callable, Sequence
from typing import Final

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modulation.errors import ModelError
from modulation.evaluation.data import Record
from modulation.evaluation.quality import Perplexity

_SENTINEL: Final = "the-answer-stands-here"


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
