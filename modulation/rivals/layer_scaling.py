"""Whole layers scaled: every neuron of a layer times one factor, at every token.

Knows a model's sites. Knows nothing of which neurons matter, nor of how a factor is chosen.

It asks whether the choice of neurons does anything that a layer's volume does not. The neurons are what the
output projection is given, so its bias, where it has one, stays as it is. Families that normalise what the
MLP gives (gemma2, gemma3_text, olmo2) undo positive factors nearly altogether.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

from torch import nn
from transformers import PreTrainedModel

from modulation.errors import ModulationError
from modulation.rivals.passing import check_layer, passing_through
from modulation.sites import find_sites

FACTORS: Final = (0.5, 1.5, 2.0, 3.0)


@dataclass(frozen=True, slots=True)
class LayerScaling:
    """One setting: all neurons of `layer` times `factor`."""

    layer: int
    factor: float


def scaling_settings(num_layers: int, factors: Sequence[float] = FACTORS) -> list[LayerScaling]:
    """Every layer with every factor."""
    return [LayerScaling(layer, factor) for layer in range(num_layers) for factor in factors]


@contextmanager
def layers_scaled(model: PreTrainedModel, factors: Mapping[int, float]) -> Iterator[PreTrainedModel]:
    """Multiply all neurons of each layer in `factors` by its factor, in every forward pass of the block.

    The hooks come off when the block ends, however it ends.

    Raises:
        ModulationError: a layer that the model does not have, a factor that is no finite number, or a forward
            pass that went past a layer.
        UnsupportedModelError: the model's family has no known sites.
    """
    sites = find_sites(model)
    for layer, factor in factors.items():
        check_layer(layer, len(sites))
        if not math.isfinite(factor):
            raise ModulationError(
                f"Factor {factor} of layer {layer}: a finite number is needed; 1 changes nothing."
            )
    modules = {layer: sites[layer].module for layer in factors}
    with passing_through(model, list(modules.values())) as hooks:
        for layer, module in modules.items():
            hooks.callback(module.register_forward_pre_hook(_times(factors[layer])).remove)
        yield model


def _times(factor: float) -> Any:
    def multiply(_module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        return (arguments[0] * factor, *arguments[1:])

    return multiply
