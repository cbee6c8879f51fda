"""Outer gradients in both orders, steps, validation, and runs that go on where they were interrupted."""

import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from modulation.checkpoints import Checkpoint
from modulation.errors import CheckpointError
from modulation.tuning.meta import Learned, _outer_gradient, adapt, learn, validate
from modulation.tuning.objective import Objective
from modulation.tuning.tasks import Drawn, Tasks
from tests.modulation.attributing import TOKENIZER, double_model
from tests.tiny_models import FAMILIES, tiny_model
from tests.tuning.tuning import NUM_SAFETY, NUM_UTILITY, objective_of, tasks_of

NUM_NEURONS = NUM_SAFETY + NUM_UTILITY


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return double_model()


def start_at(seed: int = 1, scale: float = 0.3) -> Tensor:
    return scale * torch.randn(NUM_NEURONS, generator=torch.Generator().manual_seed(seed))


def outer(objective: Objective, tasks: Tasks, at: Tensor, seed: int = 5) -> tuple[float, Tensor]:
    return _outer_gradient(objective, tasks, at, random.Random(seed))


def slope(objective: Objective, tasks: Tasks, at: Tensor, along: Tensor) -> float:
    """Of the outer loss with its inner steps, as a function of where they start."""
    step = 0.01 / along.norm()
    sides = [outer(objective, tasks, at + sign * step * along)[0] for sign in (1, -1)]
    return (sides[0] - sides[1]) / (2 * step.item())


@pytest.mark.parametrize("inner_steps", [1, 2])
def test_second_order_is_the_slope_of_the_outer_loss_in_the_start(
    model: PreTrainedModel, inner_steps: int
) -> None:
    objective = objective_of(model, second_order=True, inner_steps=inner_steps, inner_rate=0.1)
    tasks, at = tasks_of(model), start_at()
    _, gradient = outer(objective, tasks, at)
    for seed in range(3):
        along = start_at(seed + 20)
        assert (gradient @ along).item() == pytest.approx(
            slope(objective, tasks, at, along), rel=0.02, abs=0.01
        )


def test_first_order_is_the_mean_of_the_gradients_before_the_inner_steps_and_after(
    model: PreTrainedModel,
) -> None:
    """And it is another than second order's: the curvature counts."""
    objective = objective_of(model, inner_steps=2, inner_rate=0.1)
    tasks = tasks_of(model)
    source = random.Random(5)
    support_families, query_families = tasks.support_and_query(source)
    at = start_at()
    losses, gradients = [], []
    drawn = [tasks.draw(source, 6, objective.aims, support_families) for _ in range(2)]
    drawn.append(tasks.draw(source, 8, objective.aims, query_families))
    for each in drawn:
        point = at.clone().requires_grad_()
        loss = objective(point, each).loss
        (gradient,) = torch.autograd.grad(loss, point)
        losses.append(loss.item())
        gradients.append(gradient)
        at = at - 0.1 * gradient
    found_loss, found = outer(objective, tasks, start_at())
    assert found_loss == pytest.approx((losses[0] + losses[2]) / 2, rel=1e-5)
    torch.testing.assert_close(found, (gradients[0] + gradients[2]) / 2, rtol=1e-3, atol=1e-5)
    second = objective_of(model, inner_steps=2, inner_rate=0.1, second_order=True)
    assert (outer(second, tasks, start_at())[1] - found).norm() > 0.01 * found.norm()


def test_plain_risk_minimisation_has_no_inner_step_and_draws_from_all_families(
    model: PreTrainedModel,
) -> None:
    objective = objective_of(model, method="erm")
    tasks, at = tasks_of(model), start_at()
    drawn = tasks.draw(random.Random(5), 8, objective.aims, tasks.families)
    loss, gradient = outer(objective, tasks, at)
    assert loss == pytest.approx(objective(at, drawn).loss.item(), rel=1e-6)
    along = start_at(3)
    assert (gradient @ along).item() == pytest.approx(slope(objective, tasks, at, along), rel=0.02, abs=0.01)


def run(model: PreTrainedModel, *, validated: bool = True, seed: int = 0, **more: Any) -> Learned:
    names = ("checkpoint", "on_step")
    objective = objective_of(model, **{name: each for name, each in more.items() if name not in names})
    tasks = tasks_of(model)
    more = {name: more[name] for name in names if name in more}
    return learn(objective, tasks, tasks if validated else None, torch.zeros(NUM_NEURONS), seed=seed, **more)


def test_the_seed_decides_alone(model: PreTrainedModel) -> None:
    one, same, other = (run(model, seed=seed, validated=False).parameters for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_the_loss_falls(model: PreTrainedModel) -> None:
    weights = {"divergence_weight": 6.0, "likelihood_weight": 0.3}
    learned = run(model, num_steps=12, validate_every=4, rate=0.2, **weights)
    objective, tasks = objective_of(model, **weights), tasks_of(model)
    assert learned.history[-1]["loss"] < validate(objective, tasks, torch.zeros(NUM_NEURONS))["loss"] - 0.1


def test_factors_stay_within_the_bound(model: PreTrainedModel) -> None:
    parameters = run(model, rate=5.0, bound=2.0, inner_rate=4.0).parameters
    assert parameters.abs().max().item() == pytest.approx(math.log(2))


def test_without_validation_the_last_parameters_are_returned(model: PreTrainedModel) -> None:
    learned = run(model, validated=False)
    assert learned.num_steps == 4 and learned.history == []


def test_the_best_of_all_validations_is_returned_and_patience_ends_the_run(model: PreTrainedModel) -> None:
    """A rate this large makes the loss go up again."""
    learned = run(model, num_steps=40, validate_every=1, patience=2, rate=2.0)
    losses = [each["loss"] for each in learned.history]
    best = losses.index(min(losses))
    assert len(losses) < 40 and best == len(losses) - 3, "two more validations, neither better"
    assert learned.num_steps == learned.history[best]["step"]
    objective = objective_of(model)
    again = validate(objective, tasks_of(model), learned.parameters)
    assert again == {name: each for name, each in learned.history[best].items() if name != "step"}


def test_validation_counts_margins_on_the_wrong_side(model: PreTrainedModel) -> None:
    objective, tasks = objective_of(model), tasks_of(model)
    found = validate(objective, tasks, start_at())
    # The same prompts and thresholds: more are asked for than there are.
    drawn = tasks.sample(random.Random("0/validation"), 48, objective.aims)
    margins = objective(start_at(), drawn).margins.tolist()
    attacked = [m < 0 for m, p in zip(margins, drawn.prompts, strict=True) if p.kind == "attacked"]
    borderline = [m > 0 for m, p in zip(margins, drawn.prompts, strict=True) if p.kind == "borderline"]
    assert found["attack_success"] == pytest.approx(sum(attacked) / 5)
    assert found["over_refusal"] == pytest.approx(sum(borderline) / 2)
    assert len(attacked) == 5 and len(borderline) == 2


@pytest.mark.parametrize("size", [2, 3, 7])
def test_validation_in_batches_is_that_of_one_batch(
    model: PreTrainedModel, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts come kind by kind. Batches were once weighted by their number of prompts, so that a kind which
    fell into two of them counted double, and the factors taken were the best of another loss."""
    objective, tasks = objective_of(model), tasks_of(model)
    whole = validate(objective, tasks, start_at())
    seen = objective(start_at(), tasks.sample(random.Random("0/validation"), 48, objective.aims))
    assert whole["loss"] == pytest.approx((seen.loss - seen.terms["shrinkage"]).item(), rel=1e-5)
    monkeypatch.setattr("modulation.tuning.meta._VALIDATION_BATCH", size)
    assert validate(objective, tasks, start_at()) == pytest.approx(whole, rel=1e-5)


class Stopped(Exception):
    """What stands for a kill in these tests."""


NUM_STEPS = 6


@pytest.mark.parametrize("method", ["maml", "erm"])
def test_a_run_stopped_after_any_step_goes_on_to_the_same_bits(
    model: PreTrainedModel, method: str, tmp_path: Path
) -> None:
    whole = run(model, num_steps=NUM_STEPS, method=method)
    for last in range(1, NUM_STEPS):
        path = tmp_path / str(last)

        def stop(step: int, *_: object, last: int = last) -> None:
            if step == last + 1:
                raise Stopped

        def checkpoint(path: Path = path) -> Checkpoint:
            return Checkpoint(path, "key", seconds_between=0)

        with pytest.raises(Stopped):
            run(model, num_steps=NUM_STEPS, method=method, checkpoint=checkpoint(), on_step=stop)
        steps: list[int] = []
        again = run(
            model,
            num_steps=NUM_STEPS,
            method=method,
            checkpoint=checkpoint(),
            on_step=lambda step, *_, steps=steps: steps.append(step),
        )
        assert steps == list(range(last + 1, NUM_STEPS + 1))
        assert torch.equal(again.parameters, whole.parameters)
        assert (again.history, again.num_steps) == (whole.history, whole.num_steps)


def test_a_run_that_patience_ended_is_not_gone_on_with(model: PreTrainedModel, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    early: dict[str, Any] = {"num_steps": 40, "validate_every": 1, "patience": 2, "rate": 2.0}
    whole = run(model, checkpoint=Checkpoint(path, "key"), **early)
    steps: list[int] = []
    again = run(model, checkpoint=Checkpoint(path, "key"), on_step=lambda n, *_: steps.append(n), **early)
    assert not steps and torch.equal(again.parameters, whole.parameters)
    with pytest.raises(CheckpointError, match="belongs to another run"):
        run(model, checkpoint=Checkpoint(path, "other"))


def adapting(model: PreTrainedModel, **changes: Any) -> Objective:
    """As the inner loop is run alone: every prompt at all neurons."""
    objective = objective_of(model, **changes)
    return replace(objective, aims=replace(objective.aims, all_active=True))


def gradients_at(objective: Objective, tasks: Tasks, at: Tensor) -> list[Any]:
    """Of the attacked term, the borderline one and the rest together, on all prompts there are."""
    drawn = tasks.sample(random.Random("0/adapt/0"), 9, objective.aims)
    assert len(drawn.prompts) == 5 + 3 + 2 + 2, "all there are"
    assert set(drawn.thresholds) == {objective.aims.maximum}
    point = at.clone().requires_grad_()
    terms = objective(point, drawn).terms
    found = {
        name: torch.autograd.grad(term, point, retain_graph=True)[0].double().numpy()
        for name, term in terms.items()
    }
    return [found.pop("attacked"), found.pop("borderline"), np.sum(list(found.values()), axis=0)]


@pytest.mark.parametrize(("seed", "conflicts"), [(2, True), (1, False)])
def test_a_step_of_adaptation_lowers_the_attacked_term_at_right_angles_to_what_may_not_rise(
    model: PreTrainedModel, seed: int, conflicts: bool
) -> None:
    objective, tasks = adapting(model, support_size=9, shrinkage=0.2), tasks_of(model)
    at = start_at(seed)
    attacked, borderline, rest = gradients_at(objective, tasks, at)
    # Gram-Schmidt by least squares: what of the attacked gradient the others do not span.
    held = np.stack([borderline], axis=1)
    free, rest_free = (each - held @ np.linalg.lstsq(held, each, rcond=None)[0] for each in (attacked, rest))
    assert (free @ rest_free < 0) == conflicts, "or this shows nothing"
    if conflicts:
        held = np.stack([borderline, rest], axis=1)
    expected = attacked - held @ np.linalg.lstsq(held, attacked, rcond=None)[0]
    found = adapt(objective, tasks, at, num_steps=1, rate=0.2, budget=1.0)
    assert found.num_steps == 1
    step = (at - found.parameters).double().numpy() / 0.2
    np.testing.assert_allclose(step, expected, rtol=1e-3, atol=2e-4 * np.linalg.norm(attacked))
    again = adapt(objective, tasks, at, num_steps=2, rate=0.2, budget=1.0)
    assert again.num_steps == 2 and not torch.equal(again.parameters, found.parameters)


def refused(objective: Objective, tasks: Tasks, parameters: Tensor) -> float:
    drawn = Drawn(tasks.borderline, (objective.aims.maximum,) * len(tasks.borderline))
    with torch.no_grad():
        margins = objective(parameters, drawn).margins.double().numpy()
    return float(np.mean(1 / (1 + np.exp(-margins))))


def test_a_step_beyond_the_budget_is_not_taken_and_the_next_is_half_as_long(model: PreTrainedModel) -> None:
    objective = adapting(model, support_size=9, attacked_margin=9.0)
    tasks, at = tasks_of(model), start_at(38)
    before = refused(objective, tasks, at)
    free = adapt(objective, tasks, at, num_steps=1, rate=2.0, budget=1.0)
    assert free.num_steps == 1 and refused(objective, tasks, free.parameters) > before + 0.01
    assert free.refusal_before == pytest.approx(before, abs=1e-5)
    assert free.refusal_after == pytest.approx(refused(objective, tasks, free.parameters), abs=1e-5)
    none = adapt(objective, tasks, at, num_steps=1, rate=2.0, budget=0.01)
    assert none.num_steps == 0 and torch.equal(none.parameters, at)
    assert none.refusal_after == none.refusal_before
    # Every step sees all prompts that there are, so the second is the first with half the rate.
    half = adapt(objective, tasks, at, num_steps=2, rate=2.0, budget=0.01)
    first = adapt(objective, tasks, at, num_steps=1, rate=2.0 / 2, budget=0.01)
    assert half.num_steps == first.num_steps == 1
    torch.testing.assert_close(half.parameters, first.parameters)


def test_the_budget_is_counted_from_the_start_and_not_from_the_last_step(model: PreTrainedModel) -> None:
    objective = adapting(model, support_size=9, attacked_margin=9.0)
    tasks, at = tasks_of(model), start_at(2)
    first, second = (adapt(objective, tasks, at, num_steps=n, rate=1.0, budget=1.0) for n in (1, 2))
    fallen = [each.refusal_after - each.refusal_before for each in (first, second)]
    assert -0.04 < fallen[1] < fallen[0] < -0.02, "or this shows nothing"
    # It must fall by 0.02: both steps have it fallen so far from the start, the second not from the first.
    held = adapt(objective, tasks, at, num_steps=2, rate=1.0, budget=-0.02)
    assert held.num_steps == 2 and torch.equal(held.parameters, second.parameters)


def test_where_nothing_is_a_number_no_step_is_taken(model: PreTrainedModel) -> None:
    objective, tasks, at = adapting(model, support_size=9), tasks_of(model), start_at()
    found = adapt(objective, tasks, at, num_steps=2, rate=math.nan, budget=1.0)
    assert found.num_steps == 0 and torch.equal(found.parameters, at)


@pytest.mark.parametrize("second_order", [False, True], ids=["first", "second"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_learns_and_the_model_stays_as_it_was(family: str, second_order: bool) -> None:
    model = tiny_model(family, vocab_size=len(TOKENIZER))
    before = {name: each.clone() for name, each in model.named_parameters()}
    learned = run(model, num_steps=2, second_order=second_order)
    assert learned.parameters.isfinite().all()
    # Behind a ReLU (OPT) some neurons are silent for every token: their factors stay.
    assert (learned.parameters != 0).sum() > NUM_NEURONS / 2
    assert all(torch.equal(each, before[name]) for name, each in model.named_parameters())
    assert all(each.requires_grad and each.grad is None for each in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_bfloat16_models_have_float32_factors() -> None:
    learned = run(tiny_model(vocab_size=len(TOKENIZER)).bfloat16(), num_steps=2)
    assert learned.parameters.dtype == torch.float32 and learned.parameters.isfinite().all()
