"""What attribution methods take and give. Every method is one function of type `Attribution`.

Knows data shapes. Knows no method.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from modulation.attribution.accumulate import Accumulator
from modulation.errors import DataError


@dataclass(frozen=True, slots=True)
class Example:
    """A user's prompt with one answer that refuses and one that complies (for a benign prompt, the
    correct answer). `name` is what errors call it."""

    prompt: str
    refusing: str
    complying: str
    name: str = ""


@dataclass(frozen=True, slots=True)
class AttributionData:
    """Examples by kind: `harmful` as they are, `attacked` wrapped, by attack family."""

    harmful: tuple[Example, ...]
    attacked: Mapping[str, tuple[Example, ...]]
    benign: tuple[Example, ...]
    borderline: tuple[Example, ...]

    @property
    def all_harmful(self) -> tuple[Example, ...]:
        """Plain and attacked, in this order."""
        return (*self.harmful, *(each for family in self.attacked.values() for each in family))

    def require(self, *groups: str, way_out: str = "") -> None:
        """Raise DataError where one of `groups` (field names) has no examples, or a family has none."""
        for group in groups:
            if not getattr(self, group):
                raise DataError(f"There are no {group} prompts: {_HOW_TO_ADD[group]}.{way_out}")
        for name, examples in self.attacked.items():
            if not examples:
                raise DataError(f"Attack family {name!r} has no prompts: add some or leave the family out.")


_HOW_TO_ADD = {
    "harmful": "add records with kind 'harmful' and without a family",
    "attacked": "add records with kind 'harmful' and a family, or use a method that needs none",
    "benign": "add records with kind 'benign'",
    "borderline": "add records with kind 'borderline'",
}


@dataclass(frozen=True, slots=True)
class Scores:
    """How much each neuron carries safety and how much utility: float32 (layers, neurons), higher
    is more. The two are on scales of their own."""

    safety: Tensor
    utility: Tensor


Attribution = Callable[[PreTrainedModel, PreTrainedTokenizerFast, AttributionData, Accumulator], Scores]
"""A method. Its options are keyword-only parameters, bound by `functools.partial`.

It reads the model and leaves it as it was; it sums through the accumulator, so that it can be killed and
gone on with. Raises DataError for data that it cannot use."""
