"""Attention of a packed step on CUDA: each request to its own keys, in one kernel.

Knows the arguments that transformers' continuous batching gives a model, and its paged cache. Knows no level
and no mask of neurons.

Without the flash-attn package, transformers lets all tokens of a step attend to all keys through one matrix
that masks other requests' keys. torch has the kernel for sequences of their own lengths too; nothing is
masked, and no shape depends on which requests there are, so that CUDA graphs can hold it.
"""

from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, PreTrainedModel

from server.engines.attention import attends_to_everything, refuse_unknown

NAME: Final = "varlen"
# What the kernel takes: these types, heads of so many numbers, GPUs of this generation or newer.
_DTYPES: Final = (torch.bfloat16, torch.float16)
_WIDEST_HEAD: Final = 256
_OLDEST: Final = (8, 0)


def can_attend_varlen(model: PreTrainedModel) -> bool:
    """Whether this attention is for the model."""
    return why_not_varlen(model) is None


def why_not_varlen(model: PreTrainedModel) -> str | None:
    """Why this attention is not for the model; None: it is. It is on CUDA, in half precision, where
    transformers would take SDPA with one mask, and every layer attends to everything before it."""
    if model.device.type != "cuda":
        return f"on {model.device.type}"
    if model.dtype not in _DTYPES:
        return f"in {str(model.dtype).removeprefix('torch.')}"
    if torch.cuda.get_device_capability(model.device) < _OLDEST:
        return "the GPU is older than compute capability 8.0"
    config: Any = model.config.get_text_config(decoder=True)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if width % 8 or width > _WIDEST_HEAD:
        return f"heads of {width} numbers"
    return None if attends_to_everything(model) else "a layer does not attend to everything before it"


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,  # noqa: ARG001 - the manager builds none for this attention
    scaling: float | None = None,
    *,
    cache: Any,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    **arguments: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers' interface has it: `query` (1, heads, tokens, width), `key` and `value` with
    as many heads or a fraction; (1, tokens, heads, width) and no weights are returned.

    Raises:
        ValueError: the model asks for what this is not.
    """
    refuse_unknown(arguments)
    key, value = cache.update(key, value, module.layer_idx, arguments)  # (1, heads of keys, keys, width)
    query, key, value = (each[0].transpose(0, 1) for each in (query, key, value))
    answers = varlen_attn(
        query,
        key,
        value,
        cu_seq_lens_q,
        arguments["cu_seq_lens_k"],
        max_length_q,
        arguments["max_length_k"],
        scale=scaling,
        window_size=(-1, 0),  # causal
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(answers, Tensor), type(answers)
    return answers[None], None


AttentionInterface.register(NAME, attend)
