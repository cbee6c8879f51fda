"""Linear layers on CPU, with their weights laid out as oneDNN's kernels read them.

Knows modules and oneDNN through torch. Knows nothing of what a model is for.

torch multiplies float32 weights by MKL as they lie in memory, which for the few rows of a step takes up to
several times as long, and bfloat16 ones by oneDNN, which lays them out anew at each call
(docs/measurements.md). The operations used here are those that torch's own compiler puts in their place.
"""

from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

_DTYPES: Final = (torch.float32, torch.bfloat16)
# Weights of fewer numbers stay in the core's cache from step to step where a model has no others: for these
# calling oneDNN takes longer than MKL takes (docs/measurements.md),
_FEWEST: Final = 120_000
# and for these it does for a single row.
_FEWEST_FOR_ONE_ROW: Final = 300_000
# Rows that a layout is chosen for; it serves fewer and more nearly as well as their own.
_NUM_ROWS: Final = 16


def pack_weights(model: nn.Module) -> None:
    """Lay the weights of `model`'s linear layers out anew where that makes them faster, for good: results
    are the same up to rounding, and no gradient flows. On other devices, or without oneDNN, nothing happens.

    A small weight, and one that an embedding shares, is kept beside its copy. Any other is given up for it:
    what `module.weight` gives then has its shape, dtype and device, and is NaN.
    """
    users = Counter(id(each.weight) for each in model.modules() if hasattr(each, "weight"))
    for module in model.modules():
        if type(module) is not nn.Linear or not _is_faster(module.weight):
            continue
        is_large, is_shared = module.weight.numel() >= _FEWEST_FOR_ONE_ROW, users[id(module.weight)] > 1
        replaced: Any = module
        replaced.forward = packed_linear(module.weight.detach(), module.bias, 1 if is_large else 2)
        if is_large and not is_shared:
            hollow = torch.full((), torch.nan, dtype=module.weight.dtype).expand(module.weight.shape)
            module.weight = nn.Parameter(hollow, requires_grad=False)


def _is_faster(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or weight.dtype not in _DTYPES or weight.numel() < _FEWEST:
        return False
    onednn: Any = torch.backends.mkldnn
    if not (onednn.is_available() and onednn.enabled):
        return False
    return weight.dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def packed_linear(weight: Tensor, bias: Tensor | None, fewest_rows: int) -> Callable[[Tensor], Tensor]:
    """The forward pass of a linear layer, (..., in) to (..., out): with the weight laid out anew from so many
    rows on. It keeps the weight only where fewer rows need it."""
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, _NUM_ROWS)

    def product(rows: Tensor) -> Tensor:
        found: Tensor = torch.ops.mkldnn._linear_pointwise(rows, packed, bias, "none", [], "")
        return found

    def multiplied(input: Tensor) -> Tensor:
        number = input.shape[:-1].numel()
        missing = padded_rows(number) - number
        if not missing:
            return product(input)
        rows = input.reshape(number, input.shape[-1])
        products = product(pad(rows, (0, 0, 0, missing)))[:number]
        return products.view(*input.shape[:-1], products.shape[-1])

    if fewest_rows == 1:
        return multiplied

    def forward(input: Tensor) -> Tensor:
        few = input.shape[:-1].numel() < fewest_rows
        return linear(input, weight, bias) if few else multiplied(input)

    return forward


@cache
def padded_rows(number: int) -> int:
    """How many rows so many are computed as. oneDNN makes and keeps a program of about half a megabyte for
    each number of rows, in some tenths of a millisecond. So there are few numbers: of more than 16 rows at
    most a quarter is added, a twelfth at the mean."""
    if number <= 2:
        return number
    step = max(4, 1 << (number - 1).bit_length() >> 3)
    return -(-number // step) * step
