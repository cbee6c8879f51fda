"""The machinery that methods share: teacher-forced answers, gates on neurons, activations read.

Knows sites and gradients. Knows no method's choice of data or of how scores are put together.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from modulation.attribution.base import Example
from modulation.sites import Site, find_sites

# Whether a model refuses shows in the first words of its answer.
NUM_ANSWER_TOKENS: Final = 4
_BATCH_SIZE: Final = 16

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class MarginGradient:
    """d(refusal margin) / d(gate) per neuron over examples, float32 (layers, neurons): its mean, and the
    mean of its absolute value, in which what helps one example does not make up for what harms another."""

    mean: Tensor
    mean_absolute: Tensor


def margin_gradient(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, examples: Sequence[Example]
) -> MarginGradient:
    """How the refusal margin of each example changes with a gate on each neuron.

    The refusal margin is the log-probability of the refusing answer's first tokens minus that of the
    complying one's. A gate multiplies a neuron at every token and stands at 1, so its gradient is the
    sum over tokens of activation x gradient: the first-order effect of scaling the neuron.
    """
    sites = find_sites(model)
    total, absolute = (torch.zeros(len(sites), sites[0].width) for _ in range(2))
    for batch in _batches(examples):
        # One gate per example and neuron, so that one backward pass gives every example's gradient.
        gates = [
            torch.ones(len(batch), 1, site.width, device=model.device, requires_grad=True) for site in sites
        ]

        def gated(index: int, activations: Tensor) -> Tensor:
            gate = gates[index].to(activations.dtype)  # noqa: B023
            by_example = activations.reshape(len(gate), -1, activations.shape[-1])
            return (by_example * gate).reshape(activations.shape)

        with _hooked(sites, gated):
            refusing = answer_log_probability(model, tokenizer, [(e.prompt, e.refusing) for e in batch])
            complying = answer_log_probability(model, tokenizer, [(e.prompt, e.complying) for e in batch])
        gradients = torch.autograd.grad((refusing - complying).sum(), gates)
        per_example = torch.stack([each.squeeze(1).float().cpu() for each in gradients], dim=1)
        total += per_example.sum(dim=0)
        absolute += per_example.abs().sum(dim=0)
    return MarginGradient(total / max(1, len(examples)), absolute / max(1, len(examples)))


def mean_activation(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, pairs: Sequence[tuple[str, str]]
) -> Tensor:
    """Mean activation over the tokens that answer, for (prompt, answer): float32 (layers, neurons)."""
    sites = find_sites(model)
    total = torch.zeros(len(sites), sites[0].width)
    for batch in _batches(pairs):
        tokens, answers = _teacher_forced(model, tokenizer, batch)
        weights = answers.float() / answers.sum(dim=1, keepdim=True)  # (rows, tokens)

        def read(index: int, activations: Tensor) -> Tensor:
            flat = activations.reshape(*weights.shape, -1).float()  # noqa: B023
            total[index] += torch.einsum("rt,rtn->n", weights, flat).cpu()  # noqa: B023
            return activations

        with torch.no_grad(), _hooked(sites, read):
            model(tokens, use_cache=False)
    return total / max(1, len(pairs))


def answer_log_probability(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, pairs: Sequence[tuple[str, str]]
) -> Tensor:
    """Log-probability of each answer's first tokens after its prompt, summed: float32 (pairs,)."""
    tokens, answers = _teacher_forced(model, tokenizer, pairs)
    logits = model(tokens, use_cache=False).logits.float()
    predicted = logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)
    summed: Tensor = (predicted * answers[:, :-1]).sum(dim=1)
    return summed


def _batches(items: Sequence[T]) -> Iterator[Sequence[T]]:
    return (items[start : start + _BATCH_SIZE] for start in range(0, len(items), _BATCH_SIZE))


def _teacher_forced(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, pairs: Sequence[tuple[str, str]]
) -> tuple[Tensor, Tensor]:
    """Right-padded tokens (rows, tokens) and which of them predict an answer's token, bool, same shape.

    Padding stands after every token that counts, where causal attention cannot see it.
    """
    rows, starts = [], []
    for prompt, answer in pairs:
        turns = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        head = tokenizer(text, add_special_tokens=False)["input_ids"]
        tail = tokenizer(answer, add_special_tokens=False)["input_ids"][:NUM_ANSWER_TOKENS]
        rows.append([*head, *tail])
        starts.append(len(head))
    width = max(map(len, rows))
    tokens = torch.zeros(len(rows), width, dtype=torch.int64)
    answers = torch.zeros(len(rows), width, dtype=torch.bool)
    for row, (ids, start) in enumerate(zip(rows, starts, strict=True)):
        tokens[row, : len(ids)] = torch.tensor(ids)
        answers[row, start - 1 : len(ids) - 1] = True
    return tokens.to(model.device), answers.to(model.device)


@contextmanager
def _hooked(sites: Sequence[Site], change: Callable[[int, Tensor], Tensor]) -> Iterator[None]:
    """Replace the activations of site number `index` by `change(index, activations)` in the block."""
    with ExitStack() as stack:
        for index, site in enumerate(sites):

            def hook(_module: nn.Module, arguments: tuple[Any, ...], index: int = index) -> tuple[Any, ...]:
                return (change(index, arguments[0]), *arguments[1:])

            stack.callback(site.module.register_forward_pre_hook(hook).remove)
        yield
