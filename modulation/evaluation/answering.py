"""Prompts to answers, with a transformers model in this process.

Knows a model and its tokenizer; knows nothing of records, judges or neurons. Modulated models and
servers behind a URL answer through the same function type.
"""

from collections.abc import Callable, Iterator

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

Answerer = Callable[[list[str]], list[str]]
"""Prompts to answers, in order, one each."""


def transformers_answerer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int = 64,
    batch_size: int = 64,
    on_answered: Callable[[int], object] | None = None,
    on_answer: Callable[[int, str], object] | None = None,
) -> Answerer:
    """Greedy answers to single user messages, in left-padded batches of similar length.

    `on_answered` is told after each batch how many prompts it held (for progress bars); `on_answer` is
    told each prompt's row and answer as soon as it is there.
    """

    def answer(prompts: list[str]) -> list[str]:
        texts = [_chat_text(tokenizer, prompt) for prompt in prompts]
        answers = [""] * len(prompts)
        for rows in _by_length(texts, batch_size):
            batch = _generate(model, tokenizer, [texts[row] for row in rows], max_new_tokens)
            for row, text in zip(rows, batch, strict=True):
                answers[row] = text
                if on_answer:
                    on_answer(row, text)
            if on_answered:
                on_answered(len(rows))
        return answers

    return answer


def _chat_text(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )
    assert isinstance(text, str), type(text)
    return text


def _by_length(texts: list[str], batch_size: int) -> Iterator[list[int]]:
    order = sorted(range(len(texts)), key=lambda row: len(texts[row]))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def _generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    max_new_tokens: int,
) -> list[str]:
    batch = tokenizer(
        texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False
    ).to(model.device)
    with torch.inference_mode():
        output = model.generate(  # type: ignore[operator]
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
    new_tokens = output[:, batch["input_ids"].shape[1] :]
    return [text.strip() for text in tokenizer.batch_decode(new_tokens, skip_special_tokens=True)]
