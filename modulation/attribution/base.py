"""What attribution methods take and give. Every method is one function of type `Attribution`.

Knows data shapes. Knows no method.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast


@dataclass(frozen=True, slots=True)
class Example:
    """A user's prompt with one answer that refuses and one that complies (for a benign prompt, the
    correct answer). Only the answers' beginnings are read."""

    prompt: str
    refusing: str
    complying: str


@dataclass(frozen=True, slots=True)
class AttributionData:
    """Examples by kind: `harmful` as they are, `attacked` wrapped, by attack family."""

    harmful: tuple[Example, ...]
    attacked: Mapping[str, tuple[Example, ...]]
    benign: tuple[Example, ...]
    borderline: tuple[Example, ...]


@dataclass(frozen=True, slots=True)
class Scores:
    """How much each neuron carries safety and how much utility: float32 (layers, neurons), higher
    is more. The two are on scales of their own."""

    safety: Tensor
    utility: Tensor


Attribution = Callable[[PreTrainedModel, PreTrainedTokenizerFast, AttributionData], Scores]
