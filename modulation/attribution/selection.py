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
    chosen: tuple[list[int], list[int]] = ([], [])
    taken: set[int] = set()
    best = zip(_positive(scores.safety), _positive(scores.utility), strict=True)
    for pair in best:
        for neuron, kind, size in zip(pair, chosen, (num_safety, num_utility), strict=True):
            if neuron is not None and neuron not in taken and len(kind) < size:
                kind.append(neuron)
                taken.add(neuron)
        if len(chosen[0]) == num_safety and len(chosen[1]) == num_utility:
            break
    return _positions(chosen[0], width), _positions(chosen[1], width)


def candidates(
    scores: Scores, num_safety: int, num_utility: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """As `ranked_sets`, but of whatever score: every neuron belongs to the kind in which it ranks better,
    at equal rank to safety. What they are worth is found by learning (`modulation/tuning/pruning.py`)."""
    width = scores.safety.shape[1]
    safety, utility = _ranks(scores.safety), _ranks(scores.utility)
    is_safety = safety <= utility
    return (
        _positions([n for n in safety.argsort().tolist() if is_safety[n]][:num_safety], width),
        _positions([n for n in utility.argsort().tolist() if not is_safety[n]][:num_utility], width),
    )


def _ranks(scores: torch.Tensor) -> torch.Tensor:
    """The rank of every neuron, 0 for the best: int64 (neurons,)."""
    return scores.flatten().argsort(descending=True, stable=True).argsort()


def _positive(scores: torch.Tensor) -> list[int | None]:
    """Flat indices of all neurons, best first, with None for those whose score is not positive."""
    flat = scores.flatten()
    order = flat.argsort(descending=True, stable=True)
    return [
        index if positive else None
        for index, positive in zip(order.tolist(), (flat > 0)[order].tolist(), strict=True)
    ]


def _positions(neurons: list[int], width: int) -> npt.NDArray[np.int32]:
    return np.array([divmod(neuron, width) for neuron in neurons], dtype=np.int32).reshape(-1, 2)
