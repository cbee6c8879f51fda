"""What the tests of attribution share: data, a tiny model, and plain oracles without batches or gates."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from modulation.attribution.base import AttributionData, Example
from modulation.sites import find_sites, input_dimension
from tests.tiny_models import byte_tokenizer, tiny_model

ONE = Example("how?", "no!!", "yes.", "one")
TWO = Example("a longer question", "never", "do this first", "two")
DATA = AttributionData(
    harmful=(ONE, TWO),
    attacked={
        "please": (Example("please: how?", "no!!", "yes.", "three"), TWO),
        "two": (TWO, Example("and?", "no!!", "so", "four"), ONE),
    },
    benign=(Example("hello", "no!!", "good day", "five"), Example("what is it", "no!!", "tea", "six")),
    borderline=(Example("kill a process", "no!!", "use kill", "seven"),),
)
TOKENIZER = byte_tokenizer()


def double_model(family: str = "llama", **overrides: object) -> PreTrainedModel:
    """A tiny model in float64, with little noise in the oracles' differences."""
    return tiny_model(family, vocab_size=len(TOKENIZER), **overrides).double()


def tokens_of(tokenizer: PreTrainedTokenizerFast, example: Example, answer: str) -> tuple[list[int], int]:
    """The tokens of a prompt and an answer after it, and how many are the prompt's."""
    head = tokenizer.apply_chat_template(
        [{"role": "user", "content": example.prompt}], add_generation_prompt=True, tokenize=False
    )
    prompt = tokenizer(head, add_special_tokens=False)["input_ids"]
    return prompt + tokenizer(answer, add_special_tokens=False)["input_ids"], len(prompt)


@torch.no_grad()
def log_probability(model: PreTrainedModel, example: Example, answer: str, num_tokens: int) -> float:
    """Of the answer's first tokens, from all logits of one unpadded row."""
    tokens, start = tokens_of(TOKENIZER, example, answer)
    tokens = tokens[: start + num_tokens]
    logits = model(torch.tensor([tokens])).logits[0].double().log_softmax(-1)
    return sum(logits[place - 1, tokens[place]].item() for place in range(start, len(tokens)))


def margin(model: PreTrainedModel, example: Example, num_tokens: int = 4) -> float:
    """The refusal margin, one answer at a time."""
    refusing = log_probability(model, example, example.refusing, num_tokens)
    return refusing - log_probability(model, example, example.complying, num_tokens)


@contextmanager
def scaled(model: PreTrainedModel, layer: int, index: int | slice, factor: float) -> Iterator[None]:
    """The model with the weights that read a neuron scaled, which is what a gate on it does."""
    site = find_sites(model)[layer]
    weight = site.module.weight
    assert isinstance(weight, Tensor)
    with torch.no_grad():
        kept = weight.clone()
        column = weight[:, index] if input_dimension(site.module) == 1 else weight[index]
        column *= factor
        yield
        weight.copy_(kept)


@torch.no_grad()
def activations(model: PreTrainedModel, tokens: list[int]) -> list[Tensor]:
    """Of every layer, (tokens, neurons), for one unpadded row."""
    seen: list[Tensor] = []
    handles = [
        site.module.register_forward_pre_hook(
            lambda _module, arguments: seen.append(arguments[0].reshape(len(tokens), -1).clone())
        )
        for site in find_sites(model)
    ]
    model(torch.tensor([tokens]))
    for handle in handles:
        handle.remove()
    return seen
