"""Attention of a packed step, request by request.

Knows the arguments that transformers' continuous batching gives a model, and its paged cache. Knows no
level and no mask of neurons.

Without flash attention, transformers lets all tokens of a step attend to all keys through one matrix that
masks other requests' keys: its cost grows with the square of the number of requests. Here, requests with one
new token attend as a batch, each to its own keys, padded to the longest of those of a similar length; prompts
attend one by one.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

NAME: Final = "sdpa_by_request"
_PLAN: Final = "attention_plan"


@dataclass(frozen=True, slots=True)
class _Decoding:
    """Requests with one new token, of a similar number of keys."""

    queries: Tensor  # int (requests,): which of the step's tokens
    keys: slice  # of what is read: requests x length of them
    length: int
    mask: Tensor  # (requests, 1, 1, length), added to scores: 0, or minus infinity where there is no key


@dataclass(frozen=True, slots=True)
class _Prompt:
    """A request with several new tokens: the last ones of its keys."""

    queries: slice
    keys: slice
    mask: Tensor | None  # bool (queries, keys); None: these are all its keys, so causal


@dataclass(frozen=True, slots=True)
class Plan:
    """How a step's tokens attend: `read`, int (keys,), is what the cache is to give, request after request as
    the parts say; `order`, int (tokens,), puts the parts' tokens into the step's order (None: they are)."""

    decoding: Sequence[_Decoding]
    prompts: Sequence[_Prompt]
    read: Tensor
    order: Tensor | None


def can_attend_by_request(model: PreTrainedModel) -> bool:
    """Whether this attention is for the model: on CPU, where transformers would take SDPA with one mask, and
    every layer attends to everything before it."""
    config: Any = model.config.get_text_config(decoder=True)
    layers = getattr(config, "layer_types", None) or ()
    slides = set(layers) - {"full_attention"} if layers else getattr(config, "sliding_window", None)
    return model.device.type == "cpu" and model.config._attn_implementation == "sdpa" and not slides


def plan(step: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The arguments of a step that begins, with those that let it attend by request."""
    ends_q: list[int] = step["cu_seq_lens_q"].tolist()
    [ends_k] = [each.tolist() for each in step["cu_seq_lens_k"].values()]
    [read] = step["read_index"]
    made = _planned(ends_q, ends_k, read, dtype)
    return {**step, "read_index": [made.read], _PLAN: made}


def _planned(ends_q: list[int], ends_k: list[int], read: Tensor, dtype: torch.dtype) -> Plan:
    """`ends_q` and `ends_k`: where each request's new tokens and keys begin, and at last end."""
    similar: dict[int, list[int]] = defaultdict(list)
    prompts: list[_Prompt] = []
    parts: list[Tensor] = []  # of what is read
    order: list[int] = []  # the tokens, as the parts have them
    num_read = 0
    spans = list(zip(pairwise(ends_q), pairwise(ends_k), strict=True))
    for number, ((begin, end), (first, last)) in enumerate(spans):
        if end - begin == 1 and len(read):
            similar[(last - first - 1).bit_length()].append(number)
    decoding: list[_Decoding] = []
    for numbers in similar.values():
        firsts = torch.tensor([spans[number][1][0] for number in numbers])
        lengths = torch.tensor([last - first for first, last in (spans[number][1] for number in numbers)])
        length = int(lengths.max())
        places = torch.arange(length)
        # Where a request has no more keys, it reads its last one again, and the mask leaves it out.
        wanted = firsts[:, None] + torch.minimum(places, lengths[:, None] - 1)
        mask = torch.zeros(len(numbers), 1, 1, length, dtype=dtype)
        mask.masked_fill_((places >= lengths[:, None])[:, None, None], float("-inf"))
        queries = [spans[number][0][0] for number in numbers]
        keys = slice(num_read, num_read + wanted.numel())
        decoding.append(_Decoding(torch.tensor(queries), keys, length, mask))
        parts.append(read[wanted.flatten()])
        order += queries
        num_read = keys.stop
    decoded = set(order)
    for (begin, end), (first, last) in spans:
        if begin in decoded or begin == end:
            continue
        num_queries, num_keys = end - begin, last - first
        causal = None
        if num_queries < num_keys:
            causal = torch.ones(num_queries, num_keys, dtype=torch.bool).tril_(num_keys - num_queries)
        keys = slice(num_read, num_read + num_keys)
        prompts.append(_Prompt(slice(begin, end), keys, causal))
        parts.append(read[first:last])
        order += range(begin, end)
        num_read = keys.stop
    is_sorted = all(a < b for a, b in pairwise(order))
    inverse = None if is_sorted else torch.tensor(order).argsort()
    return Plan(decoding, prompts, torch.cat(parts) if len(read) else read, inverse)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,  # noqa: ARG001 - the manager builds none for this attention
    scaling: float | None = None,
    *,
    cache: Any,
    attention_plan: Plan,
    **arguments: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers' interface has it: `query` (1, heads, tokens, width), `key` and `value` with
    as many heads or a fraction; (1, tokens, heads, width) and no weights are returned."""
    key, value = cache.update(key, value, module.layer_idx, arguments)  # (1, heads of keys, keys, width)
    num_heads, num_tokens, num_kv_heads = query.shape[1], query.shape[2], key.shape[1]
    outputs: list[Tensor] = []  # (tokens, heads, width)
    for batch in attention_plan.decoding:
        number = len(batch.queries)
        is_all = attention_plan.order is None and number == num_tokens
        asked = query[0] if is_all else query[0].index_select(1, batch.queries)
        # Heads that share keys attend as if they were so many queries.
        asked = asked.transpose(0, 1).reshape(number, num_kv_heads, num_heads // num_kv_heads, -1)
        ks, vs = (
            each[0, :, batch.keys].view(num_kv_heads, number, batch.length, -1).transpose(0, 1)
            for each in (key, value)
        )
        found = scaled_dot_product_attention(asked, ks, vs, attn_mask=batch.mask, scale=scaling)
        outputs.append(found.reshape(number, num_heads, -1))
    for prompt in attention_plan.prompts:
        found = scaled_dot_product_attention(
            query[:, :, prompt.queries],
            key[:, :, prompt.keys],
            value[:, :, prompt.keys],
            attn_mask=prompt.mask,
            is_causal=prompt.mask is None,
            scale=scaling,
            enable_gqa=num_heads != num_kv_heads,
        )
        outputs.append(found[0].transpose(0, 1))
    together = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    if attention_plan.order is not None:
        together = together[attention_plan.order]
    return together[None].contiguous(), None


AttentionInterface.register(NAME, attend)
