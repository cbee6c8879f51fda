"""Which neurons are candidates, what removing one costs, what stays, and stages that go on after a stop."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from modulation.attribution.base import Scores
from modulation.attribution.selection import candidates
from modulation.errors import CheckpointError, DataError
from modulation.levels import Threshold
from modulation.masks import Mask
from modulation.tuning.drafting import draft, first_neurons, stage_sizes
from modulation.tuning.objective import Objective
from modulation.tuning.pruning import NUM_BATCHES, costliest, removal_costs
from modulation.tuning.runs import Tuned, TuningRun, tune
from modulation.tuning.settings import TuningSettings
from modulation.tuning.tasks import Drawn
from tests.modulation.attributing import TOKENIZER, double_model
from tests.tiny_models import LAYERS, WIDTH, tiny_model
from tests.tuning.tuning import DATA, NUM_SAFETY, NUM_UTILITY, mask_of, objective_of, settings, tasks_of

STEPS = {"prune_steps": 2, "num_steps": 2}
SIZES = (Threshold(6, 5), Threshold(4, 3))


def random_scores(seed: int = 0) -> Scores:
    generator = torch.Generator().manual_seed(seed)
    return Scores(*(torch.randn(LAYERS, WIDTH, generator=generator) for _ in range(2)))


def test_a_candidate_belongs_to_the_set_in_which_it_ranks_better_whatever_its_score() -> None:
    scores = random_scores()
    safety, utility = candidates(scores, LAYERS * WIDTH, LAYERS * WIDTH)
    assert len(safety) + len(utility) == LAYERS * WIDTH, "everyone is in one of them"
    order = [each.numpy().ravel().argsort()[::-1].tolist() for each in (scores.safety, scores.utility)]
    for neurons, own, other in ((safety, *order), (utility, *order[::-1])):
        flat = [layer * WIDTH + index for layer, index in neurons.tolist()]
        assert flat == [each for each in own if each in set(flat)], "best first"
        assert all(own.index(each) <= other.index(each) for each in flat)
    fewer = candidates(scores, 4, 3)
    assert np.array_equal(fewer[0], safety[:4]) and np.array_equal(fewer[1], utility[:3])
    with pytest.raises(DataError, match=r"prune_shares asks for 200 of them"):
        first_neurons(scores, [Threshold(200, 2), Threshold(2, 2)])


def test_sizes_keep_the_proportion_of_the_sets() -> None:
    model = tiny_model()  # of 144 neurons
    assert stage_sizes(model, (), Threshold(3, 1)) == (Threshold(3, 1),)
    found = stage_sizes(model, (0.5, 0.25), Threshold(3, 1))
    assert found == (Threshold(54, 18), Threshold(27, 9), Threshold(3, 1))
    assert stage_sizes(model, (0.5,), Threshold(2, 0))[0] == Threshold(72, 0)
    with pytest.raises(DataError, match=r"a share of 0\.02 is 2 of 144 neurons, fewer than the 4"):
        stage_sizes(model, (0.5, 0.02), Threshold(3, 1))


@pytest.mark.parametrize(("text", "shares"), [("0.16,0.07", (0.16, 0.07)), ("0.5", (0.5,)), ("", ())])
def test_shares_are_read_from_text(text: str, shares: tuple[float, ...]) -> None:
    assert TuningSettings.parse([f"prune_shares={text}"]).prune_shares == shares


@pytest.mark.parametrize("text", ["0.07,0.16", "0.1,0.1", "2", "0", "0.1,", "many"])
def test_shares_that_do_not_fall_or_are_none_are_refused(text: str) -> None:
    with pytest.raises(DataError, match="Option prune_shares="):
        TuningSettings.parse([f"prune_shares={text}"])


def loss_at(objective: Objective, drawn: Drawn, parameters: Tensor) -> float:
    with torch.no_grad():
        return objective(parameters, drawn).loss.item()


def test_removing_costs_half_the_fisher_information_times_the_squared_logarithm() -> None:
    """Slopes by central differences, batch by batch, with all neurons active."""
    model = double_model()
    objective, tasks = objective_of(model), tasks_of(model)
    objective = replace(objective, aims=replace(objective.aims, all_active=True))
    at = 0.5 * torch.randn(NUM_SAFETY + NUM_UTILITY, generator=torch.Generator().manual_seed(1))
    found = removal_costs(objective, tasks, at, seed=3)
    for neuron in found.argsort(descending=True)[:3].tolist():
        step = torch.zeros_like(at)
        step[neuron] = 0.02
        slopes = []
        for number in range(NUM_BATCHES):
            drawn = tasks.draw(random.Random(f"3/pruning/{number}"), 8, objective.aims, tasks.families)
            assert set(drawn.thresholds) == {Threshold(NUM_SAFETY, NUM_UTILITY)}
            sides = [loss_at(objective, drawn, at + sign * step) for sign in (1, -1)]
            slopes.append((sides[0] - sides[1]) / 0.04)
        expected = np.mean(np.square(slopes)) * at[neuron].item() ** 2 / 2
        assert found[neuron].item() == pytest.approx(expected, rel=0.05)


def test_the_costliest_neurons_of_each_set_stay_with_their_factors_ranked_by_cost() -> None:
    mask = mask_of(tiny_model())
    costs = torch.tensor([*range(NUM_SAFETY), *range(NUM_UTILITY, 0, -1)], dtype=torch.float32)
    kept = costliest(mask, costs, Threshold(3, 2))
    assert np.array_equal(kept.safety.neurons, mask.safety.neurons[[9, 8, 7]])
    assert np.array_equal(kept.safety.factors, mask.safety.factors[[9, 8, 7]])
    assert np.array_equal(kept.utility.neurons, mask.utility.neurons[:2])
    assert kept.metadata.levels == {"security-critical": (3, 2)}
    alike = costliest(mask, torch.zeros_like(costs), Threshold(3, 2))
    assert np.array_equal(alike.safety.neurons, mask.safety.neurons[:3]), "at equal cost the old rank decides"


def run(
    model: PreTrainedModel, mask: Mask, path: Path | None = None, on_step: Any = None, **changes: Any
) -> Tuned:
    sizes, seed = changes.pop("sizes", SIZES), changes.pop("seed", 0)
    chosen = TuningRun(settings(**STEPS, **changes), seed, sizes)
    more = {"on_step": on_step} if on_step else {}
    return tune(model, TOKENIZER, DATA, DATA, mask, chosen, checkpoint_path=path, **more)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model(vocab_size=len(TOKENIZER))


def test_a_run_ends_with_as_many_neurons_as_wanted_of_those_it_began_with(model: PreTrainedModel) -> None:
    mask = mask_of(model)
    made = run(model, mask).mask
    for kept, given, size in ((made.safety, mask.safety, 4), (made.utility, mask.utility, 3)):
        assert len(kept) == size
        assert {*map(tuple, kept.neurons.tolist())} < {*map(tuple, given.neurons.tolist())}
    assert made.metadata.method["tuning"]["stages"] == [(10, 8), (6, 5), (4, 3)]
    assert made.metadata.levels["security-critical"] == (4, 3)
    other = run(model, mask, seed=1).mask
    assert other.digest != made.digest == run(model, mask).mask.digest


def test_candidates_are_learned_all_active_and_what_is_left_of_them_at_many_thresholds(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[Threshold, set[Threshold]] = {}
    call = Objective.__call__

    def noting(self: Objective, parameters: Tensor, drawn: Drawn) -> Any:
        seen.setdefault(self.aims.maximum, set()).update(drawn.thresholds)
        return call(self, parameters, drawn)

    monkeypatch.setattr(Objective, "__call__", noting)
    run(model, mask_of(model))
    whole, first, last = Threshold(NUM_SAFETY, NUM_UTILITY), *SIZES
    assert seen[whole] == {whole} and seen[first] == {first}
    assert len(seen[last]) > 3, "the anchors and more"


def test_the_last_stage_begins_with_the_factors_that_pruning_reached(model: PreTrainedModel) -> None:
    """Adam's first step moves a logarithm by the rate, 0.1: from factors of 1 it would come no farther."""
    chosen = TuningRun(settings(num_steps=1, prune_steps=5), 0, SIZES[-1:])
    made = tune(model, TOKENIZER, DATA, None, mask_of(model), chosen).mask
    assert np.abs(np.log(made.safety.factors)).max() > 0.25


def test_every_step_and_batch_is_told_once_in_order(model: PreTrainedModel) -> None:
    told: list[tuple[int, int]] = []
    run(model, mask_of(model), on_step=lambda step, total, *_: told.append((step, total)))
    total = 2 * (2 + NUM_BATCHES) + 2
    assert told == [(step, total) for step in range(1, total + 1)]


class Stopped(Exception):
    """In place of a kill."""


def test_stopped_at_any_step_it_goes_on_to_the_same_mask_and_repeats_no_stage(
    model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modulation.checkpoints.Checkpoint.is_due", property(lambda _: True))
    mask, path = mask_of(model), tmp_path / "checkpoint"
    whole = run(model, mask).mask
    per_stage = 2 + NUM_BATCHES
    for stop in (1, 2, 3, per_stage, per_stage + 1, 2 * per_stage - 1, 2 * per_stage + 1):

        def stopping(step: int, *_: object, at: int = stop) -> None:
            if step == at:
                raise Stopped

        with pytest.raises(Stopped):
            run(model, mask, path, stopping)
        told: list[int] = []
        made = run(model, mask, path, lambda step, *_, told=told: told.append(step)).mask
        assert made.digest == whole.digest
        assert told[0] > (stop - 1) // per_stage * per_stage
        path.unlink()


def test_a_checkpoint_belongs_to_the_sizes_too(model: PreTrainedModel, tmp_path: Path) -> None:
    mask, path = mask_of(model), tmp_path / "checkpoint"
    run(model, mask, path)
    with pytest.raises(CheckpointError, match="belongs to another run"):
        run(model, mask, path, sizes=SIZES[1:])


def test_neurons_are_candidates_where_stages_follow_and_else_the_top_ones_of_positive_score() -> None:
    scores = random_scores(1)
    below = Scores(scores.safety - 10, scores.utility - 10)
    neurons = first_neurons(below, [Threshold(5, 5), Threshold(2, 2)])
    assert len(draft(tiny_model(), "tiny", *neurons).safety) == 5
    with pytest.raises(DataError, match="only neurons of positive score count"):
        first_neurons(below, [Threshold(2, 2)])
