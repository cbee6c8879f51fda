"""A run from a draft mask to a tuned one, what it leaves in the mask, and adaptation to a new family."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from modulation.attribution.base import AttributionData, Scores
from modulation.attribution.examples import attribution_data, digest
from modulation.attribution.teacher_forcing import Forcing
from modulation.checkpoints import Checkpoint
from modulation.demo import MASK_FILE
from modulation.demo.corpus import records
from modulation.errors import CheckpointError, DataError
from modulation.levels import Threshold
from modulation.masks import Mask, NeuronSet
from modulation.opening import open_model
from modulation.tuning.drafting import counts, draft, top_neurons
from modulation.tuning.objective import Objective
from modulation.tuning.runs import (
    AdaptationRun,
    TuningRun,
    _objective,
    adapt_mask,
    forgotten_settings,
    settings_of,
    tune,
)
from modulation.tuning.settings import ADAPTATION_BUDGET, TuningSettings
from modulation.tuning.tasks import Drawn, tasks_from
from tests.modulation.attributing import TOKENIZER
from tests.tiny_models import FAMILIES, LAYERS, WIDTH, tiny_model
from tests.tuning.tuning import DATA, mask_of, settings


def tiny(family: str = "llama") -> PreTrainedModel:
    return tiny_model(family, vocab_size=len(TOKENIZER))


def run(model: PreTrainedModel, mask: Mask, data: AttributionData = DATA, **more: Any) -> Mask:
    path, seed = more.pop("path", None), more.pop("seed", 0)
    chosen = TuningRun(settings(**{"num_steps": 2, **more}), seed)
    return tune(model, TOKENIZER, data, DATA, mask, chosen, checkpoint_path=path).mask


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_goes_from_scores_to_a_tuned_mask(family: str) -> None:
    model = tiny(family)
    generator = torch.Generator().manual_seed(0)
    scores = Scores(*(torch.rand(LAYERS, WIDTH, generator=generator) for _ in range(2)))
    num_safety, num_utility = counts(model, 0.1)
    assert (num_safety, num_utility) == (7, 7)
    drafted = draft(model, "tiny", *top_neurons(scores, num_safety, num_utility))
    made = run(model, drafted)
    assert np.array_equal(made.safety.neurons, drafted.safety.neurons)
    both = np.concatenate([made.safety.factors, made.utility.factors])
    assert np.isfinite(both).all() and (both != 1).any()
    made.verify(model)


def test_the_mask_says_how_it_was_tuned() -> None:
    model = tiny()
    made = run(model, mask_of(model), seed=3, second_order=True).metadata
    record = made.method["tuning"]
    assert record["settings"] == settings(num_steps=2, second_order=True).model_dump()
    assert record["families"] == record["validation_families"] == ["please", "two"]
    assert record["num_steps"] == record["history"][0]["step"] == 2
    assert made.data_digests == {"tuning": digest(DATA), "tuning_validation": digest(DATA)}
    assert made.seeds == {"tuning": 3}
    assert made.levels == {"security-critical": (10, 8), "balanced": (5, 8), "utility-priority": (2, 8)}


def test_the_draft_has_factors_of_one_and_the_factors_it_had_do_not_matter() -> None:
    model = tiny()
    mask = mask_of(model)
    other = replace(mask, safety=NeuronSet(mask.safety.neurons, np.full(10, 3, np.float32)))
    one, same = run(model, mask), run(model, other)
    assert one.digest == same.digest
    assert (draft(model, "x", mask.safety.neurons, mask.utility.neurons).safety.factors == 1).all()


def test_a_checkpoint_belongs_to_neurons_data_settings_and_seed(tmp_path: Path) -> None:
    model = tiny()
    mask, path = mask_of(model), tmp_path / "checkpoint"
    run(model, mask, path=path)
    kept = path.read_bytes()
    swapped = replace(mask, safety=NeuronSet(mask.safety.neurons[::-1].copy(), mask.safety.factors))
    fewer = replace(DATA, benign=DATA.benign[:1])
    for changes in ({"seed": 1}, {"rate": 0.2}, {"data": fewer}, {"mask": swapped}):
        with pytest.raises(CheckpointError, match="belongs to another run"):
            run(model, **{"mask": mask, "path": path, **changes})
    assert path.read_bytes() == kept and Checkpoint(path, "").path.exists()


def test_too_few_neurons_of_positive_score_and_too_small_a_share_are_refused() -> None:
    scores = Scores(torch.ones(LAYERS, WIDTH), -torch.ones(LAYERS, WIDTH))
    with pytest.raises(DataError, match="make 0 utility neurons, 2 were asked for"):
        top_neurons(scores, 2, 2)
    with pytest.raises(DataError, match=r"share of 0\.01 is 1 of 144 neurons"):
        counts(tiny(), 0.01)


def test_a_checkpoint_of_another_version_of_the_method_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, path = tiny(), tmp_path / "checkpoint"
    made = run(model, mask_of(model), path=path)
    assert made.metadata.method["tuning"]["outer_loss"] == "mldg"
    assert "outer_loss" not in run(model, mask_of(model), method="erm").metadata.method["tuning"]
    for name, other in (("OUTER_LOSS", "maml"), ("SHARES", {"attacked": 1.0}), ("ANCHOR_WEIGHTS", (1, 1, 1))):
        with monkeypatch.context() as patched, pytest.raises(CheckpointError, match="another run"):
            patched.setattr(f"modulation.tuning.runs.{name}", other)
            run(model, mask_of(model), path=path)


def test_adaptation_starts_from_the_masks_factors_and_drops_what_was_measured() -> None:
    model = tiny()
    mask = run(model, mask_of(model))
    measured = replace(mask, metadata=mask.metadata.model_copy(update={"evaluation": {"x": 1}}))
    still = adapt_mask(model, TOKENIZER, DATA, measured, AdaptationRun(settings(), 1, rate=1e-9))
    np.testing.assert_allclose(still.safety.factors, mask.safety.factors, rtol=1e-5)
    assert still.metadata.evaluation == {} and still.metadata.levels == mask.metadata.levels
    record = still.metadata.method["adaptation"]
    assert record["families"] == ["please", "two"] and record["refusal_budget"] == ADAPTATION_BUDGET
    assert record["num_steps"] == record["most_steps"] == 1 and record["rate"] == 1e-9
    before, after = record["refusal_of_borderline"]
    assert 0 < before < 1 and after == pytest.approx(before, abs=1e-6)
    assert record["settings"] == settings().model_dump()
    assert still.metadata.data_digests["adaptation"] == digest(DATA)
    assert "tuning" in still.metadata.method and still.metadata.seeds["adaptation"] == 0


def test_factors_that_adaptation_would_clip_are_refused() -> None:
    """A mask tuned with a wider bound, or made by hand with factors of 0, must not change unasked."""
    model = tiny()
    mask = mask_of(model)
    for factor in (0.0, 65.0):
        safety = NeuronSet(mask.safety.neurons, np.full(10, factor, np.float32))
        bad = replace(mask, safety=safety, utility=NeuronSet(mask.utility.neurons, np.ones(8, np.float32)))
        with pytest.raises(DataError, match=f"10 factors outside 0.03125 to 32, such as {factor:g}"):
            adapt_mask(model, TOKENIZER, DATA, bad, AdaptationRun(settings()))
    edge = replace(bad, safety=NeuronSet(mask.safety.neurons, np.full(10, 8, np.float32)))
    adapt_mask(model, TOKENIZER, DATA, edge, AdaptationRun(settings(), 1))


def test_adaptation_goes_on_with_the_settings_that_the_mask_was_tuned_with() -> None:
    model = tiny()
    made = run(model, mask_of(model), group_size=2, bound=20.0)
    parsed = TuningSettings.parse(["benign_weight=2"], settings_of(made))
    assert parsed == settings(num_steps=2, group_size=2, bound=20.0, benign_weight=2.0)
    assert settings_of(mask_of(model)) == {}
    made.metadata.method["tuning"]["settings"]["gone_since"] = 3
    assert TuningSettings.parse(["benign_weight=2"], settings_of(made)) == parsed
    assert forgotten_settings(made) == {"gone_since": 3}
    broken = replace(made, metadata=made.metadata.model_copy(update={"method": {"tuning": "x"}}))
    assert settings_of(broken) == {}


def demo_data(family: str, per_group: int) -> AttributionData:
    groups = (("harmful", None), ("harmful", family), ("benign", None), ("borderline", None))
    found = [r for kind, name in groups for r in records(kind, "tune", name)]  # type: ignore[arg-type]
    kept = [[r for r in found if (r.kind, r.family) == each][:per_group] for each in groups]
    return attribution_data([record for group in kept for record in group])


def test_a_few_steps_on_the_demo_model_make_it_refuse_an_attack_it_did_not_know() -> None:
    """From the shipped mask's neurons with factors of 1. The prompts are those adapted to."""
    opened, shipped = open_model("demo", "cpu", "float32"), Mask.load(MASK_FILE)
    mask = draft(opened.model, "demo", shipped.safety.neurons, shipped.utility.neurons)
    chosen = TuningSettings(support_size=12)
    data = demo_data("few_shot", 12)
    adapted = adapt_mask(opened.model, opened.tokenizer, data, mask, AdaptationRun(chosen))

    def attacked_margin(of: Mask) -> float:
        objective = _objective(opened.model, of, chosen)
        tasks = tasks_from(data, Forcing(opened.model, opened.tokenizer), needs_families=False)
        return mean_margin(objective, tasks.attacked["few_shot"], of)

    assert attacked_margin(adapted) > attacked_margin(mask) + 0.5


@torch.no_grad()
def mean_margin(objective: Objective, prompts: Any, mask: Mask) -> float:
    drawn = Drawn(tuple(prompts), (Threshold(len(mask.safety), len(mask.utility)),) * len(prompts))
    return objective(objective.shape.parameters_of(mask), drawn).margins.mean().item()


def test_parting_answers_are_needed() -> None:
    same = replace(DATA, benign=(replace(DATA.benign[0], refusing="good", complying="good day"),))
    with pytest.raises(DataError, match="'five': its answer 'good day' and the refusal 'good' do not part"):
        tasks_from(same, Forcing(tiny(), TOKENIZER))
