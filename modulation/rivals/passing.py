"""Whether the forward passes of a block went through the modules that hooks were put on.

Knows modules and their hooks. Knows nothing of what the hooks do.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from modulation.errors import ModulationError


@contextmanager
def passing_through(model: PreTrainedModel, modules: Sequence[nn.Module]) -> Iterator[ExitStack]:
    """A stack for the block's hooks; whatever is on it comes off when the block ends, however it ends.

    Raises:
        ModulationError: a forward pass of the block went past one of `modules`, whose hooks then did nothing.
    """
    passed: set[int] = set()

    def note(module: nn.Module, _arguments: tuple[Any, ...]) -> None:
        passed.add(id(module))

    with ExitStack() as hooks:
        for module in (model, *modules):
            hooks.callback(module.register_forward_pre_hook(note).remove)
        yield hooks
        missed = sum(id(module) not in passed for module in modules)
        if id(model) in passed and missed:
            raise ModulationError(
                f"The forward passes of {type(model).__name__} did not go through {missed} of {len(modules)} "
                "changed modules: this model's code bypasses the hooks, so it answered unchanged."
            )


def check_layer(layer: int, num_layers: int) -> None:
    """Raise ModulationError for a layer that a model with `num_layers` does not have."""
    if not 0 <= layer < num_layers:
        raise ModulationError(
            f"Layer {layer} is out of range: this model has {num_layers} layers (0-{num_layers - 1})."
        )
