"""What may be told of a mask: counts and recorded rates, whatever else its maker wrote into it."""

from typing import Any

import numpy as np
import pytest

from modulation.levels import Threshold
from modulation.masks import Mask, MaskMetadata, NeuronSet
from modulation.profiles import profile_of


def mask_with(evaluation: dict[str, Any]) -> Mask:
    metadata = MaskMetadata(
        model_id="m",
        architecture="a",
        model_fingerprint="f",
        num_layers=3,
        neurons_per_layer=8,
        levels={"security-critical": (3, 1), "balanced": (1, 1)},
        evaluation=evaluation,
    )
    safety = NeuronSet(np.array([[2, 7], [0, 1], [2, 0]], np.int32), np.array([0.5, 4.0, 2.0], np.float32))
    return Mask(safety, NeuronSet(np.zeros((1, 2), np.int32), np.array([0.25], np.float32)), metadata)


def test_layers_are_counted_for_any_number_of_active_neurons() -> None:
    profile = profile_of(mask_with({}))
    assert (profile.num_layers, profile.neurons_per_layer) == (3, 8)
    assert profile.safety.per_layer(3) == [1, 0, 2] and profile.utility.per_layer(3) == [1, 0, 0]
    assert [profile.safety.per_layer(3, number) for number in (0, 1, 2)] == [[0, 0, 0], [0, 0, 1], [1, 0, 1]]
    assert profile.safety.factors == (0.5, 4.0) and profile.utility.factors == (0.25, 0.25)


def test_recorded_rates_are_read_by_level_and_by_threshold() -> None:
    rate = {"rate": 0.5, "low": 0.25, "high": 0.75, "count": 1, "total": 2}
    point = {"threshold": [2, 1], "metrics": {"asr": rate, "asr_by_family": {"x": rate}}}
    evaluation = {
        "prompts": "mine",
        "levels": {"off": {"asr": rate}, "gone": {"asr": rate}},
        "curve": [point],
    }
    profile = profile_of(mask_with(evaluation))
    told = {"asr": {"rate": 0.5, "low": 0.25, "high": 0.75}}
    assert [(each.level, each.threshold, each.rates) for each in profile.levels] == [
        ("off", Threshold(0, 0), told)
    ]
    assert [(each.threshold, each.rates) for each in profile.curve] == [(Threshold(2, 1), told)]
    assert profile.prompts == "mine"


@pytest.mark.parametrize(
    "evaluation",
    [
        {"levels": []}, {"levels": {"off": 1}}, {"levels": {"off": {"asr": {"rate": "0.5"}}}},
        {"levels": {"off": {"asr": {"rate": 2}}}}, {"levels": {"off": {"asr": {"rate": True}}}},
        {"levels": {"off": {"asr": {"rate": float("nan")}}}}, {"levels": {"off": {"neurons": {"rate": 0.5}}}},
        {"curve": 3}, {"curve": [3]}, {"curve": [{"threshold": [1], "metrics": {}}]}, {"prompts": 3},
        {"curve": [{"threshold": [-1, 0], "metrics": {"asr": {"rate": 0.5}}}]},
    ],
)  # fmt: skip
def test_what_is_no_rate_is_left_out(evaluation: dict[str, Any]) -> None:
    profile = profile_of(mask_with(evaluation))
    assert profile.levels == () and profile.curve == () and profile.prompts == ""
