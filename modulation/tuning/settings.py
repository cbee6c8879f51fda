"""What a tuning run can be told, with defaults and bounds. docs/tuning.md explains each.

Knows names and numbers. Knows nothing of models or of how they are used.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Final, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from modulation.errors import DataError

# Few-shot adaptation: steps, how far one goes, by how much the mean probability of refusing a borderline
# prompt may rise, and the refusal margin (in nats) that is asked of attacked prompts.
ADAPTATION_STEPS: Final = 10
ADAPTATION_RATE: Final = 0.1
ADAPTATION_BUDGET: Final = 0.005
ADAPTATION_MARGIN: Final = 5.0
ADAPTATION_OPTIONS: Final = (
    "support_size",
    "batch_size",
    "bound",
    "group_size",
    "attacked_margin",
    "harmful_margin",
    "borderline_margin",
    "benign_margin",
    "attacked_weight",
    "harmful_weight",
    "benign_weight",
    "likelihood_weight",
    "divergence_weight",
    "shrinkage",
)
"""The options that adaptation goes by. Of borderline prompts only the direction counts, not their weight."""

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]


def _listed(given: Any) -> Any:
    """Numbers in one text, separated by commas, are a list."""
    return [each for each in given.split(",") if given] if isinstance(given, str) else given


def _falling(shares: tuple[float, ...]) -> tuple[float, ...]:
    if list(shares) != sorted(set(shares), reverse=True):
        raise ValueError("each share must be smaller than the one before")
    return shares


Shares = Annotated[
    tuple[Annotated[float, Field(gt=0, le=1)], ...], BeforeValidator(_listed), AfterValidator(_falling)
]


class TuningSettings(BaseModel):
    """Defaults were chosen on validation families of the demo model's `tune` split (docs/trials.md)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: Literal["maml", "erm"] = "maml"
    second_order: bool = False
    inner_steps: int = Field(default=1, ge=1, le=10)
    inner_rate: Positive = 0.3
    support_size: int = Field(default=24, ge=4)
    num_steps: int = Field(default=90, ge=1)
    batch_size: int = Field(default=64, ge=8)
    rate: Positive = 0.1
    bound: float = Field(default=32.0, gt=1, le=1e4, allow_inf_nan=False)
    group_size: int = Field(default=1, ge=1)
    validate_every: int = Field(default=90, ge=1)
    patience: int = Field(default=4, ge=1)
    validation_size: int = Field(default=120, ge=1)
    prune_shares: Shares = ()
    prune_steps: int = Field(default=30, ge=1)

    attacked_margin: float = 2.0
    harmful_margin: float = 5.0
    borderline_margin: float = 3.0
    benign_margin: float = 4.0

    attacked_weight: Weight = 10.0
    attacked_weight_low: Weight = 0.3
    borderline_weight: Weight = 3.0
    borderline_weight_low: Weight = 3.0
    harmful_weight: Weight = 0.5
    benign_weight: Weight = 1.0
    likelihood_weight: Weight = 0.6
    divergence_weight: Weight = 12.0
    shrinkage: Weight = 0.002

    @classmethod
    def parse(cls, given: Sequence[str], base: Mapping[str, Any] | None = None) -> Self:
        """The defaults, or `base`, with `given` ("key=value") in their place; DataError names what does
        not fit."""
        values: dict[str, str] = {}
        for each in given:
            name, separator, text = each.partition("=")
            if not separator:
                raise DataError(f"Option {each!r} has no '='; options are written key=value.")
            if name in values:
                raise DataError(f"Option {name!r} is given twice.")
            if name not in cls.model_fields:
                raise DataError(f"Option {name!r} is unknown; accepted: {', '.join(cls.model_fields)}.")
            values[name] = text
        try:
            return cls.model_validate({**(base or {}), **values})
        except ValidationError as error:
            first = error.errors()[0]
            name = str(first["loc"][0])
            raise DataError(f"Option {name}={first['input']!r}: {first['msg']}.") from error
