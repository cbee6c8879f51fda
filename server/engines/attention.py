"""Attention of a packed step, request by request.

Knows the arguments that transformers' continuous batching gives a model, and its paged cache. Knows no
level and no mask of neurons.

Without flash attention, transformers lets all tokens of a step attend to all keys through one matrix that
masks other requests' keys: its cost grows with the square of the number of requests. Here each request
attends to its own keys; those of similar lengths do so as one batch. Where there is little to compute, the
matrix stays.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel
from transformers.generation.continuous_batching.input_outputs import ContinuousBatchingIOs

NAME: Final = "sdpa_by_request"
# So many products of a token and a key are computed sooner than requests are told apart.
_FEW: Final = 8192
# What some models ask of attention, and this does not do.
_UNKNOWN: Final = ("softcap", "s_aux", "position_bias", "dropout")


@dataclass(frozen=True, slots=True)
class Group:
    """Requests that attend together, each to its own keys, padded to the longest of them.

    `shape`: how many there are, tokens of each, keys of each. `queries`, int (requests x tokens,): which of
    the step's tokens (None: all as they come). `keys`: where theirs are in what is read. `mask` (requests, 1,
    tokens, keys), added to scores: 0, or minus infinity where there is nothing to see (None: nothing is
    padded, and each has as many keys as tokens, which see what is causal, or one token, which sees all).
    """

    shape: tuple[int, int, int]
    queries: Tensor | None
    keys: slice
    mask: Tensor | None

    @property
    def is_all_as_it_comes(self) -> bool:
        """Whether all tokens and all keys of a step are in it, as one request's."""
        return self.queries is None and self.shape[0] == 1


@dataclass(frozen=True, slots=True)
class Plan:
    """How a step's tokens attend. `read`, int (keys,): what the cache is to give; empty: nothing, there are
    only the step's own keys, of which `own`, int (keys,), are taken. `order`, int (tokens,): where each token
    of the step is in what the groups give (None: there it is)."""

    groups: Sequence[Group]
    read: Tensor
    own: Tensor | None
    order: Tensor | None


def can_attend_by_request(model: PreTrainedModel) -> bool:
    """Whether this attention is for the model: on CPU, where transformers would take SDPA with one mask, and
    every layer attends to everything before it."""
    return model.device.type == "cpu" and attends_to_everything(model)


def attends_to_everything(model: PreTrainedModel) -> bool:
    """Whether transformers would take SDPA, and every layer attends to everything before it."""
    config: Any = model.config.get_text_config(decoder=True)
    layers = getattr(config, "layer_types", None) or ()
    slides = set(layers) - {"full_attention"} if layers else getattr(config, "sliding_window", None)
    return model.config._attn_implementation == "sdpa" and not slides


def refuse_unknown(arguments: Mapping[str, Any]) -> None:
    """Raise ValueError if a model asks for what attention to a request's own keys does not do."""
    for name in _UNKNOWN:
        given = arguments.get(name)
        if isinstance(given, Tensor) or given:
            raise ValueError(f"Attention by request does not know {name}.")


class PlannedIOs(ContinuousBatchingIOs):
    """The inputs of steps, with what lets them attend by request."""

    def get_model_kwargs(self, use_padding: bool = False) -> Any:
        """As the base class does, with the step's plan."""
        step: Any = super().get_model_kwargs(use_padding)
        assert not use_padding, "steps are padded for CUDA graphs alone"
        ends_q: list[int] = step["cu_seq_lens_q"].tolist()
        [ends_k] = [each.tolist() for each in step["cu_seq_lens_k"].values()]
        [read] = step["read_index"]
        made = plan(ends_q, ends_k, read, self.model_dtype)
        return {**step, "read_index": [made.read], "attention_plan": made}


def plan(ends_q: list[int], ends_k: list[int], read: Tensor, dtype: torch.dtype) -> Plan:
    """`ends_q` and `ends_k`: where each request's new tokens and keys begin, and at last end. `read`, int
    (keys,): where the cache has the keys, request after request; empty if there are none but the new ones."""
    if len(ends_q) == 2 and ends_q[1] in (1, ends_k[1]):  # a request by itself, that sees all it may
        return Plan([Group((1, ends_q[1], ends_k[1]), None, slice(0, ends_k[1]), None)], read, None, None)
    first_q, first_k = np.array(ends_q[:-1]), np.array(ends_k[:-1])
    num_q, num_k = np.diff(ends_q), np.diff(ends_k)
    if len(num_q) > 1 and ends_q[-1] * ends_k[-1] <= _FEW:
        return Plan([_all_at_once(first_q, first_k, num_q, num_k, dtype)], read, None, None)
    groups: list[Group] = []
    keys: list[np.ndarray] = []  # by group: which of all keys it takes
    order = np.empty(ends_q[-1], dtype=np.int64)
    given = 0  # what the groups so far give
    for numbers in _grouped(num_q, num_k):
        have_q, have_k = num_q[numbers, None], num_k[numbers, None]
        longest_q, longest_k = int(have_q.max()), int(have_k.max())
        tokens, places = np.arange(longest_q), np.arange(longest_k)
        # Where a request has no more of them, its last one stands again: nobody reads those answers, and the
        # mask leaves those keys out.
        asked = first_q[numbers, None] + np.minimum(tokens, have_q - 1)
        wanted = first_k[numbers, None] + np.minimum(places, have_k - 1)
        real = tokens < have_q
        order[asked[real]] = given + np.flatnonzero(real)
        is_whole = bool((have_q == have_k).all() and real.all())
        seen = places < (have_k - have_q + 1)[:, :, None] + np.minimum(tokens, have_q - 1)[:, :, None]
        mask = None if is_whole else np.where(seen, np.float32(0), np.float32(-np.inf))[:, None]
        begin = sum(map(len, keys))
        groups.append(
            Group(
                (len(numbers), longest_q, longest_k),
                torch.from_numpy(asked.ravel()),
                slice(begin, begin + wanted.size),
                None if mask is None else torch.from_numpy(mask).to(dtype),
            )
        )
        keys.append(wanted.ravel())
        given += asked.size
    taken = np.concatenate(keys)
    own = None if len(read) or _is_range(taken) else torch.from_numpy(taken)
    if len(groups) == 1 and _is_range(asked.ravel()):
        groups = [replace(groups[0], queries=None)]
    in_order = _is_range(order) and given == len(order)
    return Plan(
        groups, read[taken] if len(read) else read, own, None if in_order else torch.from_numpy(order)
    )


def _all_at_once(
    first_q: np.ndarray, first_k: np.ndarray, num_q: np.ndarray, num_k: np.ndarray, dtype: torch.dtype
) -> Group:
    """All tokens and all keys as one request's, with others' keys left out."""
    last_k = np.repeat(first_k + num_k - num_q - first_q, num_q) + np.arange(num_q.sum())
    places = np.arange(num_k.sum())
    seen = (places >= np.repeat(first_k, num_q)[:, None]) & (places <= last_k[:, None])
    mask = np.where(seen, np.float32(0), np.float32(-np.inf))
    return Group((1, *mask.shape), None, slice(0, len(places)), torch.from_numpy(mask)[None, None].to(dtype))


def _is_range(numbers: np.ndarray) -> bool:
    return np.array_equal(numbers, np.arange(len(numbers)))


def _grouped(num_q: np.ndarray, num_k: np.ndarray) -> Iterator[list[int]]:
    """Requests that have one new token, and those that have more: together if that pads little, else in
    groups that differ less than twofold in tokens and in keys."""
    for chosen in (np.flatnonzero(num_q == 1), np.flatnonzero(num_q > 1)):
        of_q, of_k = num_q[chosen], num_k[chosen]
        if not len(chosen):
            continue
        if len(chosen) * of_q.max() * of_k.max() <= 2 * (of_q * of_k).sum():
            yield chosen.tolist()
            continue
        similar: dict[tuple[int, int], list[int]] = defaultdict(list)
        for number, tokens, keys in zip(chosen.tolist(), of_q.tolist(), of_k.tolist(), strict=True):
            similar[(tokens - 1).bit_length(), (keys - 1).bit_length()].append(number)
        yield from similar.values()


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
    as many heads or a fraction; (1, tokens, heads, width) and no weights are returned.

    Raises:
        ValueError: the model asks for what this is not.
    """
    refuse_unknown(arguments)
    key, value = cache.update(key, value, module.layer_idx, arguments)  # (1, heads of keys, keys, width)
    if attention_plan.own is not None:
        key, value = (each.index_select(2, attention_plan.own) for each in (key, value))
    group = attention_plan.groups[0]
    if group.is_all_as_it_comes and query.shape[1] == key.shape[1]:
        causal = group.mask is None and query.shape[2] > 1
        found = scaled_dot_product_attention(
            query, key, value, attn_mask=group.mask, is_causal=causal, scale=scaling
        )
        return found.transpose(1, 2).contiguous(), None
    outputs = [_together(query[0], key[0], value[0], group, scaling) for group in attention_plan.groups]
    answers = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    if attention_plan.order is not None:
        answers = answers.index_select(0, attention_plan.order)
    return answers[None].contiguous(), None


def _together(query: Tensor, key: Tensor, value: Tensor, group: Group, scaling: float | None) -> Tensor:
    """What a group's tokens get, (requests x tokens, heads, width); of `query`, `key` and `value` (heads, all
    tokens or keys, width)."""
    num_requests, num_tokens, num_keys = group.shape
    num_heads, num_kv_heads = query.shape[0], key.shape[0]
    asked = query if group.queries is None else query.index_select(1, group.queries)
    asked = asked.view(num_heads, num_requests, num_tokens, -1).transpose(0, 1)
    ks, vs = (
        each[:, group.keys].view(num_kv_heads, num_requests, num_keys, -1).transpose(0, 1)
        for each in (key, value)
    )
    if num_tokens == 1:  # heads that share keys attend as if they were so many tokens
        asked = asked.reshape(num_requests, num_kv_heads, num_heads // num_kv_heads, -1)
    found = scaled_dot_product_attention(
        asked,
        ks,
        vs,
        attn_mask=group.mask,
        is_causal=group.mask is None and num_tokens > 1,
        scale=scaling,
        enable_gqa=num_tokens > 1 and num_heads != num_kv_heads,
    )
    return found.reshape(num_requests, num_heads, num_tokens, -1).transpose(1, 2).flatten(0, 1)


AttentionInterface.register(NAME, attend)
