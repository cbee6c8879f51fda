"""A model's weights as a short text, to tell whether a mask was made for them.

Knows tensors and nothing else. Guards against mistakes, not against somebody who crafts weights.
"""

import hashlib
from collections.abc import Callable, Iterable
from typing import Final

import torch
from torch import Tensor, nn

_NUM_SAMPLES: Final = 256


def fingerprint(model: nn.Module) -> str:
    """16 hexadecimal digits that depend on every parameter's name, shape and values.

    Values enter rounded to bfloat16, so the same checkpoint has one fingerprint whether it was loaded
    as float32 or bfloat16 (from float16 too, except where that loses values that bfloat16 holds), on
    any device. Each parameter enters through an exact integer sum over all its values and through
    evenly spaced samples, so this reads every weight once and copies almost none.
    """
    parameters = dict(model.named_parameters())
    return fingerprint_of(parameters, parameters.__getitem__)


def fingerprint_of(names: Iterable[str], read: Callable[[str], Tensor]) -> str:
    """The fingerprint of the model whose parameters have these names; `read` gives one at a time."""
    digest = hashlib.sha256()
    for name in sorted(names):
        parameter = read(name)
        bits = parameter.detach().to(torch.bfloat16).contiguous().view(torch.int16).flatten()
        stride = max(1, bits.numel() // _NUM_SAMPLES)
        samples = bits[::stride][:_NUM_SAMPLES].cpu().numpy()
        total = int(bits.sum(dtype=torch.int64).item())
        digest.update(f"{name}|{tuple(parameter.shape)}|{total}|".encode())
        digest.update(samples.astype("<i2").tobytes())
    return digest.hexdigest()[:16]
