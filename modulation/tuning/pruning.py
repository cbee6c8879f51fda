"""Pruning while learning: from more candidates than wanted to the neurons whose factors are worth most.

Knows factors, what putting one back to 1 would cost, and how many neurons each stage keeps. Knows nothing
of scores, of how factors are learned, or of files.

A score is about a neuron alone and near a factor of 1; what it is worth among others, with the factors that
were learned, is seen only there. To second order in log g, with the diagonal empirical Fisher information F
for the second derivative (Optimal Brain Damage, LeCun et al. 1990; Fisher pruning, Theis et al. 2018, arXiv
1801.05787), putting a factor g back to 1 costs F * (log g)^2 / 2.
"""

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from modulation.attribution.gates import frozen
from modulation.levels import SECURITY_CRITICAL, Threshold
from modulation.masks import Mask, NeuronSet
from modulation.tuning.objective import Objective
from modulation.tuning.tasks import Tasks

NUM_BATCHES: Final = 12
"""Over how many batches the Fisher information is averaged."""


def removal_costs(
    objective: Objective,
    tasks: Tasks,
    parameters: Tensor,
    *,
    seed: int,
    on_batch: Callable[[int, float], object] = lambda _number, _loss: None,
) -> Tensor:
    """What putting each factor back to 1 would cost: float32 (groups,), at parameters (groups,).

    F is the mean over batches of the squared gradient of a batch's loss, with all neurons active, as the
    objective's aims must say. `on_batch` is told the batch's number from 1 and its loss.
    """
    assert objective.aims.all_active, "what a neuron is worth is asked of all of them together"
    squares = torch.zeros_like(parameters)
    with frozen(objective.modulator.model):
        for number in range(NUM_BATCHES):
            source = random.Random(f"{seed}/pruning/{number}")
            drawn = tasks.draw(source, objective.settings.batch_size, objective.aims, tasks.families)
            point = parameters.detach().clone().requires_grad_()
            loss = objective(point, drawn).loss
            (gradient,) = torch.autograd.grad(loss, point)
            squares += gradient.square()
            on_batch(number + 1, loss.item())
    return squares / NUM_BATCHES * parameters.square() / 2


def costliest(mask: Mask, costs: Tensor, size: Threshold) -> Mask:
    """Of each set the `size` neurons that cost most to put back to 1, ranked by it, with their factors.

    `costs` is float32 (neurons,): the safety set first, by rank. At equal cost the old rank decides.
    """
    both = costs.numpy()
    num_safety = len(mask.safety)
    return with_sets(
        mask,
        _best(mask.safety, both[:num_safety], size.num_safety),
        _best(mask.utility, both[num_safety:], size.num_utility),
    )


def with_sets(mask: Mask, safety: NeuronSet, utility: NeuronSet) -> Mask:
    """The mask with other neurons; its only level is all of them."""
    levels = {SECURITY_CRITICAL: (len(safety), len(utility))}
    metadata = mask.metadata.model_copy(update={"levels": levels})
    return replace(mask, safety=safety, utility=utility, metadata=metadata)


def _best(neurons: NeuronSet, costs: npt.NDArray[np.float32], size: int) -> NeuronSet:
    order = np.argsort(-costs, kind="stable")[:size]
    return NeuronSet(neurons.neurons[order], neurons.factors[order])
