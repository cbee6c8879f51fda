"""Modulation of a site in one kernel, on CUDA: only the neurons that are active for a token are touched.

Knows tensors. Knows nothing of models or masks. Written in Triton, which torch for CUDA brings along; without
it the modulator computes the same in several steps.
"""

from typing import Final

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # torch for CPU
    triton = None

_BLOCK: Final = 128

if triton is not None:

    @triton.jit  # type: ignore[untyped-decorator, unused-ignore]
    def _kernel(  # type: ignore[no-untyped-def]
        activations,
        columns,
        kinds,
        ranks,
        factors,
        thresholds,
        num_neurons,
        row_stride,
        token_stride,
        block: tl.constexpr,
    ):  # Triton reads annotations as its own
        token = tl.program_id(0)
        places = tl.program_id(1) * block + tl.arange(0, block)
        inside = places < num_neurons
        kind = tl.load(kinds + places, mask=inside, other=0)
        rank = tl.load(ranks + places, mask=inside, other=0)
        limit = tl.load(thresholds + token * token_stride + kind, mask=inside, other=0)
        is_active = inside & (rank < limit)
        column = tl.load(columns + places, mask=is_active, other=0)
        factor = tl.load(factors + places, mask=is_active, other=1.0)
        where = activations + token.to(tl.int64) * row_stride + column
        value = tl.load(where, mask=is_active, other=0.0)
        tl.store(where, (value.to(tl.float32) * factor).to(value.dtype), mask=is_active)


def is_available(device: torch.device) -> bool:
    """Whether `scale_in_place` can run on the device."""
    return triton is not None and device.type == "cuda"


def scale_in_place(
    activations: Tensor, columns: Tensor, kinds: Tensor, ranks: Tensor, factors: Tensor, thresholds: Tensor
) -> Tensor:
    """Multiply by its factor each of the neurons whose rank is below its token's threshold for its kind.

    `activations` (..., width), contiguous, is changed in place and returned. Of shape (neurons,) are
    `columns`, where each is; `kinds`, 0 or 1; `ranks`, int32; `factors`, float32. `thresholds`, int32
    (tokens, 2), or (1, 2) for all tokens.
    """
    rows = activations.view(-1, activations.shape[-1])
    num_tokens, num_neurons = rows.shape[0], columns.shape[0]
    token_stride = thresholds.stride(0) if thresholds.shape[0] == num_tokens else 0
    grid = (num_tokens, triton.cdiv(num_neurons, _BLOCK))
    neurons = columns, kinds, ranks, factors
    _kernel[grid](rows, *neurons, thresholds, num_neurons, rows.stride(0), token_stride, block=_BLOCK)
    return activations
