"""A mask that says of itself that a level is less safe than its name is refused."""

from typing import Any

import pytest

from modulation.errors import MaskFormatError, UnsafeMaskError
from modulation.masks import Mask, MaskMetadata
from modulation.recorded import recorded_asr, refuse_less_safe
from tests.tiny_models import random_mask, tiny_model


@pytest.fixture(scope="module")
def mask() -> Mask:
    return random_mask(tiny_model())


def recording(mask: Mask, evaluation: dict[str, Any], **levels: tuple[int, int]) -> Mask:
    named = {"security-critical": (4, 2), "balanced": (2, 2), "utility-priority": (1, 2)}
    fields = mask.metadata.model_dump() | {
        "levels": named | {name.replace("_", "-"): counts for name, counts in levels.items()},
        "evaluation": evaluation,
    }
    return Mask(mask.safety, mask.utility, MaskMetadata(**fields))


def rates(**asr: float) -> dict[str, Any]:
    return {"levels": {name.replace("_", "-"): {"asr": {"rate": rate}} for name, rate in asr.items()}}


def test_levels_in_their_order_are_served(mask: Mask) -> None:
    evaluation = rates(off=0.7, utility_priority=0.7, balanced=0.4, security_critical=0.4)
    refuse_less_safe(recording(mask, evaluation))
    assert recorded_asr(recording(mask, evaluation))["balanced"] == 0.4


@pytest.mark.parametrize("evaluation", [{}, {"levels": {}}, {"levels": {"off": {"over_refusal": 1}}}])
def test_what_is_not_recorded_is_not_judged(mask: Mask, evaluation: dict[str, Any]) -> None:
    refuse_less_safe(recording(mask, evaluation))


@pytest.mark.parametrize(
    ("asr", "said"),
    [
        ({"off": 0.5, "utility_priority": 0.6}, "'utility-priority' is less safe than 'off'.*60.0%.*50.0%"),
        ({"off": 0.5, "our_own": 0.6}, "'our-own' is less safe than 'off'"),
        ({"security_critical": 0.3, "balanced": 0.2}, "'security-critical' is less safe than 'balanced'"),
        ({"security_critical": 0.3, "utility_priority": 0.2}, "less safe than 'utility-priority'"),
        ({"balanced": 0.3, "utility_priority": 0.2}, "'balanced' is less safe than 'utility-priority'"),
    ],
)
def test_a_level_that_is_less_safe_than_its_name_is_refused(
    mask: Mask, asr: dict[str, float], said: str
) -> None:
    with pytest.raises(UnsafeMaskError, match=f"{said}.*allow_less_safe_levels"):
        refuse_less_safe(recording(mask, rates(**asr), our_own=(1, 1)))


@pytest.mark.parametrize("levels", [[], {"off": 3}, {"off": {"asr": {}}}, {"off": {"asr": {"rate": "high"}}}])
def test_an_evaluation_that_cannot_be_read_is_refused(mask: Mask, levels: Any) -> None:
    with pytest.raises(MaskFormatError, match="evaluation"):
        refuse_less_safe(recording(mask, {"levels": levels}))


@pytest.mark.parametrize("rate", [float("nan"), float("inf"), -0.1, 1.5, 10**400])
def test_a_rate_that_is_none_is_refused(mask: Mask, rate: float) -> None:
    with pytest.raises(MaskFormatError, match="evaluation"):
        refuse_less_safe(recording(mask, {"levels": {"balanced": {"asr": {"rate": rate}}}}))
