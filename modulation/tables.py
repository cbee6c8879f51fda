"""A mask as dense tables, one entry per neuron of a layer: for engines that modulate by arithmetic alone.

Knows masks. Knows no model and no engine. Imports no torch.

A neuron's code says in one number of which set it is and at which rank: r for rank r of the safety set,
-(r + 1) for rank r of the utility set, `NEVER` for one that is in neither. At a threshold (num_safety,
num_utility) a neuron is active if and only if -num_utility <= code < num_safety.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from modulation.masks import Mask

NEVER: Final = np.iinfo(np.int32).max


@dataclass(frozen=True)
class LayerTable:
    """What a layer's neurons `begin` to `end` are: `codes` int32, `factors` float32, both (end - begin,)."""

    codes: npt.NDArray[np.int32]
    factors: npt.NDArray[np.float32]


def layer_table(mask: Mask, layer: int, begin: int, end: int) -> LayerTable:
    """The table of the neurons `begin` to `end` of one layer, both global indices."""
    codes = np.full(end - begin, NEVER, np.int32)
    factors = np.ones(end - begin, np.float32)
    for neurons, sign, offset in ((mask.safety, 1, 0), (mask.utility, -1, -1)):
        layers, indices = neurons.neurons[:, 0], neurons.neurons[:, 1]
        (ranks,) = np.nonzero((layers == layer) & (indices >= begin) & (indices < end))
        codes[indices[ranks] - begin] = sign * ranks + offset
        factors[indices[ranks] - begin] = neurons.factors[ranks]
    return LayerTable(codes, factors)
