"""What happens at the sites during a pass: activations read, gates set, effects of gates computed.

Knows sites and gradients. Knows nothing of answers, data or of how scores are put together.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Final, Literal, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from modulation.errors import DataError, ModelError
from modulation.sites import Site

Integrated = Literal["none", "zero_to_one", "one_to_two"]
_STARTS: Final[dict[Integrated, float]] = {"zero_to_one": 0.0, "one_to_two": 1.0}


@dataclass
class Recording:
    """One forward pass, by site: the activations, what the projection was given, what it gave."""

    activations: list[Tensor] = field(default_factory=list)
    inputs: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)


def gate_values(integrated: Integrated, steps: int) -> tuple[float, ...]:
    """Where the gates stand when gradients are taken: at 1, or at the middles of `steps` equal pieces of
    the way from 0 to 1 or from 1 to 2.

    The mean gradient over the pieces times the way's length, 1, is integrated gradients (arXiv
    1703.01365), whose sum over neurons is what opening all gates together changes.
    """
    if integrated not in get_args(Integrated):
        raise DataError(
            f"Option integrated={integrated!r} is unknown; accepted: {', '.join(get_args(Integrated))}."
        )
    if steps < 1:
        raise DataError(f"Option steps={steps}: at least 1 is needed.")
    if integrated == "none":
        return (1.0,)
    return tuple(_STARTS[integrated] + (step + 0.5) / steps for step in range(steps))


def gate_effects(
    model: PreTrainedModel,
    sites: Sequence[Site],
    objective: Callable[[], Tensor],
    values: Sequence[float] = (1.0,),
) -> Tensor:
    """d(objective) / d(gate) for every row and neuron: float32 (rows, layers, neurons), on CPU.

    `objective` runs the model once and gives one number per row, which depends on that row alone. A gate
    multiplies a neuron at every token of a row, so its gradient is the sum over tokens of activation x
    gradient: the first-order effect of scaling the neuron. The mean over `values`, at which all gates
    stand together.
    """
    total = torch.zeros(())
    for value in values:
        with frozen(model), recorded(sites, value) as recording:
            result = objective()
        gradients = torch.autograd.grad(result.sum(), recording.inputs)
        by_layer = [
            torch.einsum("rtn,rtn->rn", _by_row(a, len(result)), _by_row(g, len(result)))
            for a, g in zip(recording.activations, gradients, strict=True)
        ]
        total = total + torch.stack([each.cpu() for each in by_layer], dim=1)
    return total / len(values)


def weight_effects(
    model: PreTrainedModel,
    sites: Sequence[Site],
    objective: Callable[[], Tensor],
    reduced: Callable[[Site, Tensor], Tensor],
) -> Tensor:
    """`reduced(site, d(objective) / d(weight))`, summed over rows: float32 (layers, neurons), on CPU.

    The gradient of a row with respect to a projection's weight is (outputs, neurons), whichever way
    round the module stores it. It is made for one row and layer at a time, so that memory stays low.
    """
    with frozen(model), recorded(sites, 1.0) as recording:
        result = objective()
    gradients = torch.autograd.grad(result.sum(), recording.outputs)
    layers = []
    for site, activations, gradient in zip(sites, recording.activations, gradients, strict=True):
        rows = zip(_by_row(activations, len(result)), _by_row(gradient, len(result)), strict=True)
        layers.append(sum((reduced(site, g.T @ a).cpu() for a, g in rows), torch.zeros(site.width)))
    return torch.stack(layers)


def read_activations(
    model: PreTrainedModel, sites: Sequence[Site], tokens: Tensor, reduced: Callable[[Tensor], Tensor]
) -> Tensor:
    """`reduced(activations)` of every site, stacked along a new dimension 0: float32, on CPU.

    `reduced` gets float32 (rows, tokens, neurons), one site at a time.
    """
    found: list[Tensor] = []

    def read(activations: Tensor) -> Tensor:
        found.append(reduced(_by_row(activations, len(tokens))).cpu())
        return activations

    with torch.no_grad(), ExitStack() as hooks:
        for site in sites:
            hooks.callback(_before(site, read))
        # The logits are not wanted; at least one has to be computed.
        model(tokens, use_cache=False, logits_to_keep=1)
    _check_all_seen(sites, len(found))
    return torch.stack(found)


@contextmanager
def frozen(model: PreTrainedModel) -> Iterator[None]:
    """No parameter takes part in a graph inside the block, so that none of what they need is kept."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in learning:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)


@contextmanager
def recorded(sites: Sequence[Site], value: float) -> Iterator[Recording]:
    """Multiply every activation by `value` inside the block, and record the one forward pass there."""
    recording = Recording()

    def gate(activations: Tensor) -> Tensor:
        # A tensor of its own, so that its gradient is the projection's alone.
        opened = activations * value if value != 1.0 else activations.view_as(activations)
        # The first site's is where the graph begins.
        opened = opened if opened.requires_grad else opened.detach().requires_grad_()
        recording.activations.append(activations.detach())
        recording.inputs.append(opened)
        return opened

    def keep(_module: nn.Module, _arguments: tuple[Any, ...], output: Tensor) -> None:
        recording.outputs.append(output)

    with ExitStack() as hooks:
        for site in sites:
            hooks.callback(_before(site, gate))
            hooks.callback(site.module.register_forward_hook(keep).remove)
        yield recording
    _check_all_seen(sites, len(recording.inputs))


def _before(site: Site, change: Callable[[Tensor], Tensor]) -> Callable[[], None]:
    """Replace the activations of `site` by `change(activations)`; the result takes the hook off."""

    def hook(_module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        return (change(arguments[0]), *arguments[1:])

    return site.module.register_forward_pre_hook(hook).remove


def _by_row(activations: Tensor, num_rows: int) -> Tensor:
    """float32 (rows, tokens, neurons), also from a module that is given its tokens in one row."""
    return activations.reshape(num_rows, -1, activations.shape[-1]).float()


def _check_all_seen(sites: Sequence[Site], num_seen: int) -> None:
    if num_seen != len(sites):
        raise ModelError(
            f"A forward pass went through {num_seen} of {len(sites)} sites such as {sites[0].name}: this "
            "model's code bypasses the hooks, so its neurons cannot be attributed."
        )
