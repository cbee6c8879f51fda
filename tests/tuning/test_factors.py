"""Shared factors and bounds, the thresholds prompts are learned at, and the prompts of a task."""

import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from modulation.attribution.teacher_forcing import Forcing
from modulation.errors import DataError
from modulation.levels import Threshold
from modulation.tuning.aims import Aims
from modulation.tuning.factors import FactorShape
from modulation.tuning.tasks import tasks_from
from tests.modulation.attributing import TOKENIZER, double_model
from tests.tiny_models import random_mask, tiny_model
from tests.tuning.tuning import DATA, objective_of, settings, tasks_of

SHAPE = FactorShape(num_safety=5, num_utility=4, group_size=2, bound=16.0)


def test_neighbours_by_rank_share_a_factor_within_their_set() -> None:
    assert SHAPE.groups.tolist() == [0, 0, 1, 1, 2, 3, 3, 4, 4]
    factors = SHAPE.factors(torch.arange(5.0))
    assert factors.tolist() == pytest.approx(np.exp([0, 0, 1, 1, 2, 3, 3, 4, 4]).tolist(), rel=1e-6)
    assert FactorShape(0, 3, 1, 2.0).groups.tolist() == [0, 1, 2]
    assert FactorShape(3, 0, 8, 2.0).num_parameters == 1


def test_parameters_come_back_from_a_mask_as_the_mean_logarithm_of_each_group() -> None:
    mask = random_mask(tiny_model(), num_safety=5, num_utility=4)
    safety, utility = SHAPE.neuron_sets(torch.tensor([0.5, -1.0, 2.0, 0.0, 0.3]), mask)
    assert safety.neurons is mask.safety.neurons and utility.factors.dtype == np.float32
    made = replace(mask, safety=safety, utility=utility)
    torch.testing.assert_close(SHAPE.parameters_of(made), torch.tensor([0.5, -1.0, 2.0, 0.0, 0.3]))
    uneven = replace(made, safety=replace(safety, factors=np.array([1, 4, 1, 1, 1], np.float32)))
    assert SHAPE.parameters_of(uneven)[0].item() == pytest.approx(np.log(2))


def test_parameters_are_kept_between_the_bound_and_its_inverse() -> None:
    within = SHAPE.within_bounds(torch.tensor([-9.0, 0.1, 9.0]))
    assert within.exp().tolist() == pytest.approx([1 / 16, np.exp(0.1), 16], rel=1e-5)


@pytest.mark.parametrize("maximum", [Threshold(20, 10), Threshold(1, 1), Threshold(3, 0)])
def test_thresholds_are_drawn_within_the_mask_half_of_them_at_the_anchors(maximum: Threshold) -> None:
    aims, source = Aims(maximum, settings()), random.Random(0)
    drawn = [aims.draw(source) for _ in range(2000)]
    assert all(each.fits(maximum) for each in drawn)
    assert sum(each in aims.anchors for each in drawn) >= 900
    # Half of the prompts at the anchors, half of these at the first; a few of the others, by chance.
    assert drawn.count(aims.anchors[0]) >= 430
    assert {each.num_safety for each in drawn} == set(range(maximum.num_safety + 1)), "every count"
    assert {each.num_utility for each in drawn} == set(range(maximum.num_utility + 1))


def test_the_anchors_are_the_whole_mask_and_half_and_a_fifth_of_its_safety_neurons() -> None:
    assert Aims(Threshold(20, 10), settings()).anchors == (
        Threshold(20, 10),
        Threshold(10, 10),
        Threshold(4, 10),
    )


def test_attacks_count_more_the_more_safety_neurons_are_active() -> None:
    aims = Aims(Threshold(20, 10), settings(attacked_weight=2.0, attacked_weight_low=0.5))
    weights = [aims.weight("attacked", Threshold(count, 3)) for count in (0, 10, 20)]
    assert weights == pytest.approx([0.5, 1.25, 2.0])
    assert aims.weight("harmful", Threshold(0, 0)) == 0.5


def test_support_and_query_never_share_a_family() -> None:
    model = double_model()
    tasks, aims = tasks_of(model), objective_of(model).aims
    supported = Counter[str]()
    for seed in range(50):
        source = random.Random(seed)
        support, query = tasks.support_and_query(source)
        assert sorted(support + query) == sorted(tasks.families) and len(support) == 1
        supported[support[0]] += 1
        for families in (support, query):
            drawn = tasks.draw(source, 16, aims, families)
            allowed = [p for name in families for p in tasks.attacked[name]]
            assert all(p in allowed for p in drawn.prompts if p.kind == "attacked")
    assert set(supported) == set(tasks.families)


def test_a_batch_has_every_kind_by_its_share() -> None:
    model = double_model()
    drawn = tasks_of(model).draw(random.Random(0), 20, objective_of(model).aims, ["two"])
    counts = Counter(prompt.kind for prompt in drawn.prompts)
    assert counts == {"attacked": 7, "harmful": 1, "borderline": 5, "benign": 7}
    least = tasks_of(model).draw(random.Random(0), 2, objective_of(model).aims, ["two"])
    assert {prompt.kind for prompt in least.prompts} == set(counts)


def test_what_is_forced_is_the_whole_right_answer_to_harm_the_refusal() -> None:
    tasks = tasks_of(double_model())
    for prompts, examples, answer in (
        (tasks.harmful, DATA.harmful, "refusing"),
        (tasks.borderline, DATA.borderline, "complying"),
    ):
        for prompt, example in zip(prompts, examples, strict=True):
            text = TOKENIZER.decode(prompt.forced.tokens[prompt.forced.start :])
            assert text == getattr(example, answer)
    assert tasks.harmful[-1].parting.place == 3


@pytest.mark.parametrize("left_out", ["harmful", "attacked", "borderline", "benign"])
def test_tasks_say_which_prompts_they_lack(left_out: str) -> None:
    data = replace(DATA, **{left_out: {} if left_out == "attacked" else ()})
    with pytest.raises(DataError, match=f"no {left_out} prompts: add records with kind"):
        tasks_of(double_model(), data)


def test_meta_learning_of_one_family_is_refused_and_plain_risk_minimisation_is_not() -> None:
    data = replace(DATA, attacked={"two": DATA.attacked["two"]})
    forcing = Forcing(double_model(), TOKENIZER)
    with pytest.raises(DataError, match=r"at least 2 attack families.* only two\..* method=erm"):
        tasks_from(data, forcing)
    assert tasks_from(data, forcing, needs_families=False).families == ("two",)
