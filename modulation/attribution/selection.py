"""From scores to two ranked, disjoint neuron sets.

Knows ranks. Knows nothing of how scores come about or of factors.
"""

import numpy as np
import numpy.typing as npt
import torch

from modulation.attribution.base import Scores


def ranked_sets(
    scores: Scores, num_safety: int, num_utility: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """The top neurons of each kind as int32 (n, 2) of (layer, index), best first.

    A neuron that is among the best of both kinds goes to the one in which it ranks better; at equal
    rank to safety. Only neurons of positive score are taken, so a set can be smaller than asked for.
    """
    width = scores.safety.shape[1]
    safety_ranks, utility_ranks = _ranks(scores.safety), _ranks(scores.utility)
    safety = _best(scores.safety, safety_ranks <= utility_ranks, num_safety)
    utility = _best(scores.utility, utility_ranks < safety_ranks, num_utility)
    return _positions(safety, width), _positions(utility, width)


def _ranks(scores: torch.Tensor) -> torch.Tensor:
    """The rank of every neuron, 0 for the highest score: int64 (neurons,)."""
    order = scores.flatten().argsort(descending=True, stable=True)
    ranks = torch.empty_like(order)
    ranks[order] = torch.arange(len(order))
    return ranks


def _best(scores: torch.Tensor, eligible: torch.Tensor, count: int) -> torch.Tensor:
    flat = scores.flatten()
    order = flat.argsort(descending=True, stable=True)
    return order[(eligible & (flat > 0))[order]][:count]


def _positions(neurons: torch.Tensor, width: int) -> npt.NDArray[np.int32]:
    flat = neurons.numpy()
    return np.stack([flat // width, flat % width], axis=1).astype(np.int32)
