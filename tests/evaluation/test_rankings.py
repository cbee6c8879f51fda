"""Which neurons are pruned first: the set, what follows it by score, and the control beside it."""

import numpy as np
import pytest

from modulation.errors import DataError, ScoresError
from modulation.evaluation.rankings import Neurons, Pruning, random_pruning, read_counts, safety_pruning
from modulation.masks import Mask
from tests.modulation.test_attribution_scores import made
from tests.tiny_models import LAYERS, WIDTH, random_mask, tiny_model

EVERYTHING = [(layer, index) for layer in range(LAYERS) for index in range(WIDTH)]


@pytest.fixture(scope="module")
def mask() -> Mask:
    return random_mask(tiny_model())


def listed(neurons: Neurons) -> list[tuple[int, int]]:
    return [(layer, index) for layer, index in neurons.tolist()]


def test_the_ranking_goes_on_behind_the_set_by_score(mask: Mask) -> None:
    assert np.array_equal(safety_pruning(mask, (0,)).ranking, mask.safety.neurons)
    scores = made()
    found = safety_pruning(mask, (0, 40), scores)
    members, utility = listed(mask.safety.neurons), listed(mask.utility.neurons)
    rest = [each for each in EVERYTHING if each not in utility and each not in members]
    assert listed(found.ranking) == members + sorted(rest, key=lambda each: -scores.safety[each])
    assert found.counts == (0, 40)


@pytest.mark.parametrize("most", [5, 12, 40])
def test_random_neurons_are_none_of_the_masks_nor_attacked_and_from_the_same_layers(
    mask: Mask, most: int
) -> None:
    attack = safety_pruning(mask, (0, 2, most), made())
    one, same, other = (random_pruning(mask, attack, seed) for seed in (0, 0, 1))
    assert listed(one.ranking) == listed(same.ranking) != listed(other.ranking)
    attacked = listed(attack.ranking)[:most]
    forbidden = {*attacked, *listed(mask.safety.neurons), *listed(mask.utility.neurons)}
    for each in (one, other):
        assert set(listed(each.ranking)) == set(EVERYTHING) - forbidden
        assert [layer for layer, _ in listed(each.ranking)[:most]] == [layer for layer, _ in attacked]
        assert each.counts == (0, most)
    assert [one.name, other.name] == ["random 0", "random 1"]


def test_counts_are_numbers_or_shares_of_the_safety_set() -> None:
    assert read_counts("0, 5,1,25%,50%,100%,3,150%", 10) == (0, 1, 3, 5, 10, 15)
    for wrong in ("", "x", "-1", "5%%", "1.5", "\u0663", "9" * 30):
        with pytest.raises(DataError, match=r"not understood; accepted: whole numbers"):
            read_counts(f"0,{wrong}", 10)


def test_more_neurons_than_there_are_are_refused_with_the_way_out(mask: Mask) -> None:
    with pytest.raises(DataError, match=r"'safety' holds 12; accepted: 0 to 12\. .*--scores"):
        safety_pruning(mask, (0, 13))
    attack = safety_pruning(mask, (100,), made())
    with pytest.raises(DataError, match=r"100 neurons cannot be pruned.*--num-random 0"):
        random_pruning(mask, attack, 0)
    with pytest.raises(DataError, match="accepted: 0 to 12"):
        Pruning("random 0", mask.safety.neurons, (-1,))


def test_scores_of_another_model_are_refused(mask: Mask) -> None:
    with pytest.raises(ScoresError, match=r"of another model than the mask: their model_fingerprint is 'f'"):
        safety_pruning(mask, (0,), made(model_fingerprint="f"))
