"""The parameters that are learned: logarithms of factors, per neuron or shared by neurons of like rank.

Knows ranks, groups and bounds. Knows nothing of models, losses or optimisers.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from modulation.masks import Mask, NeuronSet


@dataclass(frozen=True)
class FactorShape:
    """`num_safety` and `num_utility` neurons; `group_size` neighbours by rank within a set share a factor.

    The factors stay between 1 / `bound` and `bound`; either set may amplify and suppress.
    """

    num_safety: int
    num_utility: int
    group_size: int
    bound: float

    @property
    def groups(self) -> Tensor:
        """The parameter of each neuron, safety first: int64 (neurons,)."""
        safety = torch.arange(self.num_safety) // self.group_size
        utility = torch.arange(self.num_utility) // self.group_size
        first = int(safety[-1]) + 1 if self.num_safety else 0
        return torch.cat([safety, utility + first])

    @property
    def num_parameters(self) -> int:
        return int(self.groups[-1]) + 1 if len(self.groups) else 0

    def factors(self, parameters: Tensor) -> Tensor:
        """Parameters (groups,) to factors, float32 (neurons,): safety first, by rank. Differentiable."""
        return parameters[self.groups.to(parameters.device)].exp()

    def within_bounds(self, parameters: Tensor) -> Tensor:
        """The nearest parameters that are allowed."""
        limit = math.log(self.bound)
        return parameters.clamp(-limit, limit)

    def parameters_of(self, mask: Mask) -> Tensor:
        """The parameters whose factors come nearest to the mask's: the mean logarithm of each group."""
        factors = np.concatenate([mask.safety.factors, mask.utility.factors])
        logarithms = torch.from_numpy(np.log(np.clip(factors, 1 / self.bound, self.bound))).float()
        total = torch.zeros(self.num_parameters).index_add(0, self.groups, logarithms)
        return total / torch.bincount(self.groups, minlength=self.num_parameters)

    def neuron_sets(self, parameters: Tensor, mask: Mask) -> tuple[NeuronSet, NeuronSet]:
        """The mask's neurons with these factors."""
        factors = self.factors(parameters.detach()).cpu().numpy().astype(np.float32)
        return (
            NeuronSet(mask.safety.neurons, factors[: self.num_safety]),
            NeuronSet(mask.utility.neurons, factors[self.num_safety :]),
        )
