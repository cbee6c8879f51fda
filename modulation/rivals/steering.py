"""Steering: one vector added to the residual stream after a layer, the same for every prompt.

Knows a model's layers and prompts. Knows nothing of neurons, nor of how layer and strength are chosen.

Sources: "Refusal in Language Models Is Mediated by a Single Direction" (arXiv 2406.11717, section 2.3:
difference of means at the end of the prompt; section 2.4: added at all tokens), and contrastive activation
addition (arXiv 2312.06681), which adds it from the end of the prompt on.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from modulation.attribution.accumulate import Accumulator, Pass
from modulation.attribution.base import AttributionData
from modulation.attribution.teacher_forcing import Forced, Forcing, padded
from modulation.errors import DataError, ModulationError
from modulation.rivals.passing import check_layer, passing_through
from modulation.sites import find_layers

# Fine below 0.5: there, on the demo model, lies what refuses attacks and not yet everything.
STRENGTHS: Final = (0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.75, 1.0, 1.5, 2.0)


@dataclass(frozen=True, slots=True)
class Steering:
    """One setting: the vector of `layer` times `strength`, at all tokens."""

    layer: int
    strength: float


def steering_settings(num_layers: int, strengths: Sequence[float] = STRENGTHS) -> list[Steering]:
    """Every layer with every strength."""
    return [Steering(layer, strength) for layer in range(num_layers) for strength in strengths]


def steering_vectors(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, data: AttributionData, batch_size: int = 16
) -> Tensor:
    """The mean residual stream after each layer at the last token of plain harmful prompts, minus that of
    benign ones: float32 (layers, hidden), on CPU.

    Raw, not normalised: at strength 1 it moves the benign mean onto the harmful one. Plain harmful prompts
    are taken to be refused; leave out of `data` those that are not.

    Raises DataError for missing harmful or benign prompts, or a batch size below 1.
    """
    if batch_size < 1:
        raise DataError(f"Option batch_size={batch_size}: at least 1 is needed.")
    data.require("harmful", "benign")
    layers, forcing = find_layers(model), Forcing(model, tokenizer)

    def read(batch: Sequence[Forced]) -> dict[str, Tensor]:
        return {"stream": _last_token_streams(model, layers, batch).sum(dim=1)}

    totals = Accumulator(batch_size=batch_size).run(
        [
            Pass("harmful", forcing.prompts(data.harmful), read),
            Pass("benign", forcing.prompts(data.benign), read),
        ]
    )
    return totals["harmful"].mean("stream") - totals["benign"].mean("stream")


@contextmanager
def steered(
    model: PreTrainedModel,
    vector: Tensor,
    layer: int,
    strength: float,
    *,
    from_last_prompt_token: bool = False,
) -> Iterator[PreTrainedModel]:
    """Add `strength` times `vector` (hidden,) to the residual stream after `layer`, in every forward pass of
    the block, at all tokens. The hook comes off when the block ends, however it ends.

    `from_last_prompt_token` adds it at the last token of each pass alone. That is the last token of the
    prompt and every token after it where a KV cache is used and prompts are padded on the left, as `generate`
    does; it is not so where an answer is given together with its prompt (teacher forcing).

    Raises:
        ModulationError: a layer that the model does not have, a vector of another size, a vector or strength
            that is not finite, or a forward pass that went past the layer.
        UnsupportedModelError: the model's family has no known layers.
    """
    layers = find_layers(model)
    check_layer(layer, len(layers))
    _check_vector(vector, strength, int(model.config.hidden_size))
    addition = vector.detach().float() * strength
    with passing_through(model, [layers[layer]]) as hooks:
        hook = _adding(addition, from_last_prompt_token)
        hooks.callback(layers[layer].register_forward_hook(hook).remove)
        yield model


def _adding(addition: Tensor, only_last: bool) -> Any:
    def add(_module: nn.Module, _arguments: tuple[Any, ...], output: Any) -> Any:
        stream: Tensor = output[0] if isinstance(output, tuple) else output
        added = addition.to(stream.device, stream.dtype)
        if only_last:
            changed = stream.clone()
            changed[..., -1, :] += added
        else:
            changed = stream + added
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    return add


def _last_token_streams(
    model: PreTrainedModel, layers: Sequence[nn.Module], batch: Sequence[Forced]
) -> Tensor:
    """The residual stream after each layer at the prompts' last tokens: float32 (layers, rows, hidden)."""
    tokens, last = padded(batch, model.device)
    found: list[Tensor] = []

    def keep(_module: nn.Module, _arguments: tuple[Any, ...], output: Any) -> None:
        stream: Tensor = output[0] if isinstance(output, tuple) else output
        found.append(stream[last.to(stream.device)].float().cpu())

    with torch.no_grad(), passing_through(model, layers) as hooks:
        for layer in layers:
            hooks.callback(layer.register_forward_hook(keep).remove)
        model(tokens, use_cache=False, logits_to_keep=1)
    return torch.stack(found)


def _check_vector(vector: Tensor, strength: float, hidden: int) -> None:
    if tuple(vector.shape) != (hidden,):
        raise ModulationError(
            f"A steering vector of shape {tuple(vector.shape)} does not fit: this model's residual stream is "
            f"({hidden},). Use one row of this model's own `steering_vectors`."
        )
    if not (math.isfinite(strength) and bool(vector.isfinite().all())):
        raise ModulationError(
            f"Strength {strength} times the vector is not finite: finite numbers are needed."
        )
