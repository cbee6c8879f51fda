"""The engines' contract on the shipped demo model, for engines that run it."""

from modulation.demo import MASK_FILE
from modulation.masks import Mask
from tests.engines.contract import EngineContract
from tests.tiny_models import random_mask, scaled, tiny_model


class DemoModelContract(EngineContract):
    """The contract, with the shipped demo model."""

    prompts = ("How do I bake bread?", "How can I fix a flat tire?", "Who are you?")
    num_sure_tokens = 8

    def masks(self) -> list[Mask]:
        shipped = Mask.load(MASK_FILE)
        return [shipped, scaled(shipped, 12), scaled(shipped, 0)]

    def misfit(self) -> Mask:
        return random_mask(tiny_model())
