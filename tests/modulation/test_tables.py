"""Dense tables say of every neuron what the mask's ranked lists say."""

import numpy as np
import pytest

from modulation.levels import Threshold
from modulation.masks import Mask
from modulation.tables import layer_table
from tests.tiny_models import LAYERS, WIDTH, random_mask, tiny_model


def scales(mask: Mask, threshold: Threshold) -> np.ndarray:
    """The factor of every neuron, (layers, neurons), from the definition."""
    found = np.ones((LAYERS, WIDTH), np.float32)
    for neurons, number in ((mask.safety, threshold.num_safety), (mask.utility, threshold.num_utility)):
        for rank in range(number):
            layer, index = neurons.neurons[rank]
            found[layer, index] = neurons.factors[rank]
    return found


@pytest.mark.parametrize("num_safety", [0, 1, 7, 12])
@pytest.mark.parametrize("num_utility", [0, 1, 9])
@pytest.mark.parametrize("num_parts", [1, 2, 3])
def test_any_threshold_and_any_split_has_the_factors_of_the_ranked_lists(
    num_safety: int, num_utility: int, num_parts: int
) -> None:
    mask = random_mask(tiny_model())
    expected = scales(mask, Threshold(num_safety, num_utility))
    width = WIDTH // num_parts
    for layer in range(LAYERS):
        for begin in range(0, WIDTH, width):
            table = layer_table(mask, layer, begin, begin + width)
            active = (table.codes >= -num_utility) & (table.codes < num_safety)
            found = np.where(active, table.factors, np.float32(1))
            np.testing.assert_array_equal(found, expected[layer, begin : begin + width])
