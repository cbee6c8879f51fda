"""Whose token runs under which mask."""

import pytest
import torch

from modulation.errors import ModulationError
from modulation.modulator import Modulator
from modulation.sites import find_sites
from server.engines.masks import Masks, RequestMask
from tests.tiny_models import random_mask, scaled, tiny_model

pytestmark = pytest.mark.usefixtures("both_ways")


@pytest.mark.parametrize("num_padding", [0, 3])
def test_two_masks_in_a_step_each_change_the_tokens_of_their_own(num_padding: int) -> None:
    """Where steps are padded, thresholds go on after the requests, and so do tokens."""
    model = tiny_model()
    first, second = random_mask(model), scaled(random_mask(model), 3)
    pair = [RequestMask(model, mask) for mask in (first, second)]
    thresholds = torch.tensor([[12, 9], [3, 1], [12, 9], *[[7, 7]] * num_padding], dtype=torch.int32)
    owner = torch.tensor([0, 0, 1, 2, *[2 + num_padding] * num_padding])
    words = torch.arange(3, 3 + len(owner))[None]
    found = []
    with Masks(model, first) as masks, torch.no_grad():
        masks.before_step(thresholds, owner, [pair[0], pair[1], pair[0]])
        for site in find_sites(model):
            site.module.register_forward_hook(lambda _, given, __: found.append(given[0][0].clone()))
        model(words)
        masks.check()
        together = found.copy()
        for request, tokens in ((0, [0, 1]), (1, [2]), (2, [3])):
            found.clear()
            masks.before_step(thresholds[request : request + 1], torch.zeros_like(owner), [pair[request % 2]])
            model(words)
            # The first site's inputs do not yet depend on what was modulated before.
            assert torch.equal(found[0][tokens], together[0][tokens])


def test_a_pass_that_went_past_a_site_is_found_when_it_ends() -> None:
    model = tiny_model()
    with Masks(model, random_mask(model)) as masks, torch.no_grad():
        masks.before_step(torch.tensor([[1, 1]]), torch.zeros(4, dtype=torch.int64), [None])
        find_sites(model)[0].module(torch.zeros(4, find_sites(model)[0].width))
        with pytest.raises(ModulationError, match="bypasses the hooks"):
            masks.check()


def test_two_modulators_of_one_model_do_not_share_what_a_pass_does() -> None:
    model = tiny_model()
    pair = [Modulator(model, random_mask(model, seed)) for seed in range(2)]
    with torch.no_grad(), pair[0], pair[1]:
        pair[0].set_thresholds(torch.tensor([[12, 9]]))
        with pytest.raises(ModulationError, match="No thresholds"):
            model(torch.tensor([[3, 4]]))
