"""Neurons held at 0: what somebody does who has the weights and wants safety gone (arXiv 2602.12158).

Knows a model's sites. Knows nothing of masks, levels or which neurons are worth pruning.

A pruned neuron is 0 for everybody at every token, and 0 times any factor is 0, so no level brings it back.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Final

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from modulation.errors import ModulationError
from modulation.evaluation.rankings import Neurons
from modulation.sites import Site, find_sites

_WHOLE_PASS: Final = "the model"


@contextmanager
def pruned(model: PreTrainedModel, neurons: Neurons) -> Iterator[None]:
    """Hold the activations of `neurons` at 0 in every forward pass of the block, modulated or not.

    The same as setting their columns of the output projections to 0, without touching the weights.
    The hooks come off when the block ends, however it ends.

    Raises:
        ModulationError: a neuron that the model does not have, or a forward pass that went past a site.
    """
    sites = find_sites(model)
    columns = _columns(sites, neurons)
    passed: set[str] = set()
    with ExitStack() as hooks:
        hooks.callback(model.register_forward_pre_hook(lambda *_: passed.add(_WHOLE_PASS)).remove)
        for site in sites:
            if len(columns[site.layer]):
                hook = _pruning_hook(site, columns[site.layer], passed)
                hooks.callback(site.module.register_forward_pre_hook(hook).remove)
        yield
        missed = [site.name for site in sites if len(columns[site.layer]) and site.name not in passed]
        if _WHOLE_PASS in passed and missed:
            raise ModulationError(
                f"The forward passes did not go through {missed[0]} and {len(missed) - 1} more sites: this "
                "model's code bypasses the hooks, so its neurons cannot be pruned."
            )


def _pruning_hook(site: Site, columns: torch.Tensor, passed: set[str]) -> Callable[..., tuple[Any, ...]]:
    def prune(_module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        passed.add(site.name)
        return (arguments[0].index_fill(-1, columns, 0.0), *arguments[1:])

    return prune


def _columns(sites: Sequence[Site], neurons: Neurons) -> dict[int, torch.Tensor]:
    """Indices of the neurons by layer, on the device of the layer's weight."""
    for layer, index in neurons.tolist():
        if not (0 <= layer < len(sites) and 0 <= index < sites[layer].width):
            raise ModulationError(
                f"Neuron {index} of layer {layer} cannot be pruned: this model has layers 0-{len(sites) - 1} "
                f"of neurons 0-{sites[0].width - 1}. Use this model's own mask."
            )
    found = {}
    for site in sites:
        weight = site.module.weight
        assert isinstance(weight, torch.Tensor), type(weight)
        indices = np.unique(neurons[neurons[:, 0] == site.layer, 1]).astype(np.int64)
        found[site.layer] = torch.from_numpy(indices).to(weight.device)
    return found
