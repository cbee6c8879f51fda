"""The guess by margins against one answer at a time, and the measure by answers."""

import pytest
import torch

from modulation.attribution.base import AttributionData
from modulation.errors import DataError
from modulation.evaluation.data import Check, Record
from modulation.rivals.choice import Point, best
from modulation.rivals.layer_scaling import layers_scaled, scaling_settings
from modulation.rivals.screening import generation_measure, margin_screen
from modulation.rivals.steering import steered, steering_settings, steering_vectors
from tests.modulation.attributing import DATA, TOKENIZER, margin
from tests.tiny_models import tiny_model


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("batch_size", [2, 64])
def test_the_guess_counts_the_signs_of_the_margins(seed: int, batch_size: int) -> None:
    model = tiny_model(seed=seed, vocab_size=len(TOKENIZER))
    attacked = [margin(model, each) for family in DATA.attacked.values() for each in family]
    borderline = [margin(model, each) for each in DATA.borderline]
    benign = [margin(model, each) for each in DATA.benign]
    expected = Point(
        asr=sum(each <= 0 for each in attacked) / len(attacked),
        over_refusal=sum(each > 0 for each in borderline) / len(borderline),
        benign_correct=sum(each <= 0 for each in benign) / len(benign),
    )
    assert margin_screen(model, TOKENIZER, DATA, batch_size=batch_size)() == expected


def test_the_guess_is_of_the_model_as_it_stands() -> None:
    model = tiny_model(vocab_size=len(TOKENIZER))
    screen = margin_screen(model, TOKENIZER, DATA)
    vector = torch.randn(32, generator=torch.Generator().manual_seed(3))
    guesses = {screen()}
    for scale in (-40.0, 40.0):
        with steered(model, vector, 2, scale):
            guesses.add(screen())
    assert len(guesses) > 1


def test_the_guess_needs_every_kind_of_prompt() -> None:
    model = tiny_model(vocab_size=len(TOKENIZER))
    without = AttributionData(DATA.harmful, DATA.attacked, DATA.benign, ())
    with pytest.raises(DataError, match="no borderline prompts"):
        margin_screen(model, TOKENIZER, without)


def test_both_rivals_go_through_the_same_choice_on_a_model() -> None:
    """A random model never refuses and is never right, so every setting is within the limits."""
    model = tiny_model(vocab_size=len(TOKENIZER))
    records = [
        Record(id="1", prompt="how?", kind="harmful", family="please"),
        Record(id="2", prompt="kill a process", kind="borderline"),
        Record(id="3", prompt="tea?", kind="benign", check=Check("contains_all", ("never said",))),
    ]
    measure = generation_measure(model, TOKENIZER, max_new_tokens=3)
    screen = margin_screen(model, TOKENIZER, DATA)
    vectors = steering_vectors(model, TOKENIZER, DATA)
    steering, metrics = best(
        steering_settings(3, (0.5, 1.0)),
        lambda setting: steered(model, vectors[setting.layer], setting.layer, setting.strength),
        records,
        measure,
        screen=screen,
        num_generated=2,
    )
    assert steering in steering_settings(3, (0.5, 1.0))
    assert metrics["asr"]["total"] == metrics["over_refusal"]["total"] == 1
    scaling, _ = best(
        scaling_settings(3, (0.5,)),
        lambda setting: layers_scaled(model, {setting.layer: setting.factor}),
        records,
        measure,
    )
    assert scaling == scaling_settings(3, (0.5,))[0], "all alike: the first"
