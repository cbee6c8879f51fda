"""One tuning run from a draft mask to a tuned one, so that it can be killed and gone on with.

Knows what a run's result depends on, and what goes into a mask's metadata. Knows nothing of commands.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from modulation.attribution.base import AttributionData
from modulation.attribution.examples import digest
from modulation.attribution.teacher_forcing import Forcing
from modulation.checkpoints import Checkpoint
from modulation.errors import DataError
from modulation.levels import BALANCED, SECURITY_CRITICAL, UTILITY_PRIORITY, Threshold
from modulation.masks import Mask
from modulation.modulator import Modulator
from modulation.tuning.aims import ANCHOR_SHARES, ANCHOR_WEIGHTS, Aims
from modulation.tuning.drafting import untouched
from modulation.tuning.factors import FactorShape
from modulation.tuning.meta import OUTER_LOSS, Learned, OnStep, adapt, learn
from modulation.tuning.objective import Objective
from modulation.tuning.pruning import NUM_BATCHES, costliest, removal_costs, with_sets
from modulation.tuning.settings import ADAPTATION_BUDGET, ADAPTATION_RATE, ADAPTATION_STEPS, TuningSettings
from modulation.tuning.stages import Stage
from modulation.tuning.tasks import SHARES, Tasks, tasks_from

# Factors are kept in float32: a learned one may stand on its bound.
_ROUNDING = 1e-5


@dataclass(frozen=True)
class TuningRun:
    """What is asked for. `seed` is that of the prompts' order and of the thresholds they are learned at;
    `sizes` are how many neurons are kept of those before, stage after stage (`stage_sizes`)."""

    settings: TuningSettings
    seed: int = 0
    sizes: tuple[Threshold, ...] = ()


@dataclass(frozen=True)
class AdaptationRun:
    """A few steps on the prompts of a new attack family, from the factors of a tuned mask. `budget` is by how
    much the mean probability of refusing a borderline prompt, 0 to 1, may rise, with all neurons active."""

    settings: TuningSettings
    num_steps: int = ADAPTATION_STEPS
    rate: float = ADAPTATION_RATE
    budget: float = ADAPTATION_BUDGET
    seed: int = 0


@dataclass(frozen=True)
class Tuned:
    """The mask with its learned factors, and how the learning went."""

    mask: Mask
    learned: Learned = field(repr=False)


def tune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    data: AttributionData,
    validation: AttributionData | None,
    mask: Mask,
    run: TuningRun,
    *,
    checkpoint_path: Path | None = None,
    on_step: OnStep = lambda _step, _total, _loss, _validation: None,
) -> Tuned:
    """Learn the factors of the mask's neurons, from factors of 1. `validation` decides when to stop.

    With `run.sizes` the mask's neurons are candidates: factors are learned with plain risk and the costliest
    to do without are kept, once for each size, and the factors reached are those that learning begins with.

    The caller removes the checkpoint once the result is safe.

    Raises:
        DataError: data that cannot be learned from.
        CheckpointError: a checkpoint that is damaged or of another run.
    """
    forcing = Forcing(model, tokenizer)
    tasks = tasks_from(data, forcing, needs_families=run.settings.method == "maml")
    validation_tasks = tasks_from(validation, forcing, needs_families=False) if validation else None
    key = _key(mask, data, validation, run, str(model.device), str(model.dtype))
    candidates = Threshold(len(mask.safety), len(mask.utility))
    stage = Stage.reached(Checkpoint(checkpoint_path, key) if checkpoint_path else None, untouched(mask))
    while stage.number < len(run.sizes):
        stage = stage.followed_by(_pruned(model, tasks, stage, run, on_step))
    mask = stage.mask
    objective = _objective(model, mask, run.settings)
    learned = learn(
        objective,
        tasks,
        validation_tasks,
        objective.shape.parameters_of(mask),
        seed=run.seed,
        checkpoint=stage,
        on_step=_counted(stage, run, on_step),
    )
    digests = {"tuning": digest(data)} | ({"tuning_validation": digest(validation)} if validation else {})
    record = {
        "settings": run.settings.model_dump(),
        **({"outer_loss": OUTER_LOSS} if run.settings.method == "maml" else {}),
        "num_steps": learned.num_steps,
        "families": list(data.attacked),
        "validation_families": list(validation.attacked) if validation else [],
        "stages": [(each.num_safety, each.num_utility) for each in (candidates, *run.sizes)],
        "history": learned.history,
    }
    made = _with_factors(mask, objective.shape, learned.parameters, "tuning", record, digests, run.seed)
    return Tuned(_with_anchors(made, objective.aims), learned)


def _pruned(model: PreTrainedModel, tasks: Tasks, stage: Stage, run: TuningRun, on_step: OnStep) -> Mask:
    """What a stage of pruning keeps of the mask that it began with."""
    changes = {"method": "erm", "num_steps": run.settings.prune_steps, "group_size": 1}
    objective = _objective(model, stage.mask, run.settings.model_copy(update=changes), all_active=True)
    told = _counted(stage, run, on_step)
    parameters = learn(
        objective,
        tasks,
        None,
        objective.shape.parameters_of(stage.mask),
        seed=run.seed,
        checkpoint=stage,
        on_step=told,
    ).parameters
    num_steps = run.settings.prune_steps
    costs = removal_costs(
        objective,
        tasks,
        parameters,
        seed=run.seed,
        on_batch=lambda number, loss: told(num_steps + number, 0, loss, None),
    )
    learned = with_sets(stage.mask, *objective.shape.neuron_sets(parameters, stage.mask))
    return costliest(learned, costs, run.sizes[stage.number])


def _counted(stage: Stage, run: TuningRun, on_step: OnStep) -> OnStep:
    """`on_step` told of the whole run: the steps of all stages, and the batches that pruning measures by."""
    per_stage = run.settings.prune_steps + NUM_BATCHES
    total = len(run.sizes) * per_stage + run.settings.num_steps
    done = stage.number * per_stage
    return lambda step, _total, loss, validation: on_step(done + step, total, loss, validation)


def adapt_mask(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    data: AttributionData,
    mask: Mask,
    run: AdaptationRun,
) -> Mask:
    """The mask after at most `run.num_steps` steps on these prompts; its levels stay. Its metadata say how
    many were taken, and how probable refusals of the borderline prompts were and are.

    Raises DataError for data that cannot be learned from, and for factors that the bound would change.
    """
    _refuse_out_of_bounds(mask, run.settings.bound)
    objective = _objective(model, mask, run.settings, all_active=True)
    adapted = adapt(
        objective,
        tasks_from(data, Forcing(model, tokenizer), needs_families=False),
        objective.shape.parameters_of(mask),
        seed=run.seed,
        num_steps=run.num_steps,
        rate=run.rate,
        budget=run.budget,
    )
    record = {
        "settings": run.settings.model_dump(),
        "families": list(data.attacked),
        "num_steps": adapted.num_steps,
        "most_steps": run.num_steps,
        "rate": run.rate,
        "refusal_budget": run.budget,
        "refusal_of_borderline": [adapted.refusal_before, adapted.refusal_after],
    }
    # What was measured of the mask does not hold for other factors.
    unmeasured = replace(mask, metadata=mask.metadata.model_copy(update={"evaluation": {}}))
    return _with_factors(
        unmeasured,
        objective.shape,
        adapted.parameters,
        "adaptation",
        record,
        {"adaptation": digest(data)},
        run.seed,
    )


def settings_of(mask: Mask) -> dict[str, Any]:
    """The settings that a mask was tuned with, empty where it does not say; without those that there were
    once and are no more (`forgotten_settings`)."""
    return {name: each for name, each in _recorded(mask).items() if name in TuningSettings.model_fields}


def forgotten_settings(mask: Mask) -> dict[str, Any]:
    """Of what a mask was tuned with, the settings that there are no more."""
    return {name: each for name, each in _recorded(mask).items() if name not in TuningSettings.model_fields}


def _recorded(mask: Mask) -> dict[str, Any]:
    record = mask.metadata.method.get("tuning")
    settings = record.get("settings") if isinstance(record, dict) else None
    return settings if isinstance(settings, dict) else {}


def _refuse_out_of_bounds(mask: Mask, bound: float) -> None:
    factors = np.concatenate([mask.safety.factors, mask.utility.factors]).astype(np.float64)
    outside = factors[(factors < (1 - _ROUNDING) / bound) | (factors > (1 + _ROUNDING) * bound)]
    if len(outside):
        raise DataError(
            f"The mask has {len(outside)} factors outside {1 / bound:g} to {bound:g}, such as "
            f"{outside[0]:g}: adaptation would change them unasked. Adapt with a larger --option bound=N "
            "(a factor of 0 cannot be adapted)."
        )


def _objective(
    model: PreTrainedModel, mask: Mask, settings: TuningSettings, *, all_active: bool = False
) -> Objective:
    shape = FactorShape(len(mask.safety), len(mask.utility), settings.group_size, settings.bound)
    aims = Aims(Threshold(len(mask.safety), len(mask.utility)), settings, all_active)
    return Objective(Modulator(model, mask), shape, aims, settings)


def _with_factors(
    mask: Mask,
    shape: FactorShape,
    parameters: torch.Tensor,
    name: str,
    record: Mapping[str, Any],
    digests: Mapping[str, str],
    seed: int,
) -> Mask:
    safety, utility = shape.neuron_sets(parameters, mask)
    metadata = mask.metadata.model_copy(
        update={
            "method": {**mask.metadata.method, name: dict(record)},
            "data_digests": {**mask.metadata.data_digests, **digests},
            "seeds": {**mask.metadata.seeds, name: seed},
        }
    )
    return replace(mask, safety=safety, utility=utility, metadata=metadata)


def _with_anchors(mask: Mask, aims: Aims) -> Mask:
    """Levels to begin with: the anchors. `neurontune levels` chooses better ones by measurement."""
    names = (SECURITY_CRITICAL, BALANCED, UTILITY_PRIORITY)
    levels = {n: (t.num_safety, t.num_utility) for n, t in zip(names, aims.anchors, strict=True)}
    return replace(mask, metadata=mask.metadata.model_copy(update={"levels": levels}))


def _key(
    mask: Mask,
    data: AttributionData,
    validation: AttributionData | None,
    run: TuningRun,
    device: str,
    dtype: str,
) -> str:
    """Of everything that the result depends on, and of what versions of the method differ in."""
    neurons = np.concatenate([mask.safety.neurons, mask.utility.neurons]).tobytes()
    parts = {
        "neurons": hashlib.sha256(neurons).hexdigest(),
        "num_safety": len(mask.safety),
        "model": mask.metadata.model_fingerprint,
        "data": digest(data),
        "validation": digest(validation) if validation else None,
        "settings": run.settings.model_dump(),
        "drawing": (OUTER_LOSS, dict(SHARES), ANCHOR_SHARES, ANCHOR_WEIGHTS),
        "sizes": [(each.num_safety, each.num_utility) for each in run.sizes],
        "seed": run.seed,
        "device": device,
        "dtype": dtype,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
