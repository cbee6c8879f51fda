"""What the tests of tuning share: data whose answers part late, an objective and tasks on tiny models."""

from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel

from modulation.attribution.base import AttributionData, Example
from modulation.attribution.teacher_forcing import Forcing
from modulation.levels import Threshold
from modulation.masks import Mask
from modulation.modulator import Modulator
from modulation.tuning.aims import Aims
from modulation.tuning.factors import FactorShape
from modulation.tuning.objective import Objective
from modulation.tuning.settings import TuningSettings
from modulation.tuning.tasks import Tasks, tasks_from
from tests.modulation.attributing import DATA as SHORT
from tests.modulation.attributing import TOKENIZER
from tests.tiny_models import random_mask

NUM_SAFETY, NUM_UTILITY = 10, 8
# With answers that part only at the fourth and third token.
DATA = replace(
    SHORT,
    harmful=(*SHORT.harmful, Example("how now?", "so no", "so yes", "late")),
    borderline=(*SHORT.borderline, Example("kill time", "a no", "a use of it", "later")),
)
SMALL: dict[str, Any] = {"batch_size": 8, "support_size": 6, "num_steps": 4, "validate_every": 2}


def settings(**changes: Any) -> TuningSettings:
    return TuningSettings(**{**SMALL, **changes})


def mask_of(model: PreTrainedModel) -> Mask:
    return random_mask(model, num_safety=NUM_SAFETY, num_utility=NUM_UTILITY)


def objective_of(model: PreTrainedModel, **changes: Any) -> Objective:
    chosen = settings(**changes)
    shape = FactorShape(NUM_SAFETY, NUM_UTILITY, chosen.group_size, chosen.bound)
    aims = Aims(Threshold(NUM_SAFETY, NUM_UTILITY), chosen)
    return Objective(Modulator(model, mask_of(model)), shape, aims, chosen)


def tasks_of(model: PreTrainedModel, data: AttributionData = DATA) -> Tasks:
    return tasks_from(data, Forcing(model, TOKENIZER), needs_families=False)
