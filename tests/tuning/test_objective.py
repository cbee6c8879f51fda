"""The objective against an oracle without batches, padding, hooks or the package's arithmetic."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from modulation.attribution.base import Example
from modulation.levels import Threshold
from modulation.masks import Mask
from modulation.modulator import Modulator
from modulation.tuning.objective import Objective
from modulation.tuning.tasks import Drawn
from tests.modulation.attributing import TOKENIZER, double_model, scaled, tokens_of
from tests.tiny_models import random_mask, tiny_model
from tests.tuning.tuning import DATA, NUM_SAFETY, NUM_UTILITY, mask_of, objective_of, tasks_of

THRESHOLDS = (Threshold(10, 8), Threshold(0, 0), Threshold(4, 8), Threshold(7, 2), Threshold(0, 5))
KINDS = ("attacked", "harmful", "borderline", "benign")
WEIGHTS = {"attacked_weight": 2.0, "attacked_weight_low": 0.4, "borderline_weight": 1.1}


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return double_model()


def parameters(size: int = NUM_SAFETY + NUM_UTILITY, seed: int = 0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def whole_batch(model: PreTrainedModel) -> tuple[Drawn, list[tuple[str, Example, Threshold]]]:
    """Every prompt of every kind, out of order, at thresholds in turn; and the same as examples."""
    tasks, found = tasks_of(model), []
    for name, examples in DATA.attacked.items():
        found += list(zip(tasks.attacked[name], examples, strict=True))
    for kind in ("benign", "harmful", "borderline"):
        found += list(zip(getattr(tasks, kind), getattr(DATA, kind), strict=True))
    found = found[::2] + found[1::2]
    thresholds = [THRESHOLDS[row % len(THRESHOLDS)] for row in range(len(found))]
    drawn = Drawn(tuple(prompt for prompt, _ in found), tuple(thresholds))
    rows = [(p.kind, example, t) for (p, example), t in zip(found, thresholds, strict=True)]
    return drawn, rows


@contextmanager
def weights_scaled(
    model: PreTrainedModel, mask: Mask, factors: np.ndarray, threshold: Threshold
) -> Iterator[None]:
    """The active neurons' weights multiplied, which is what modulating their activations does."""
    active = [*range(threshold.num_safety), *(NUM_SAFETY + n for n in range(threshold.num_utility))]
    neurons = np.concatenate([mask.safety.neurons, mask.utility.neurons])
    with ExitStack() as stack:
        for place in active:
            layer, index = (int(each) for each in neurons[place])
            stack.enter_context(scaled(model, layer, index, float(factors[place])))
        yield


@torch.no_grad()
def log_probabilities(model: PreTrainedModel, example: Example, answer: str) -> tuple[np.ndarray, list[int]]:
    """At every token of the answer, of all tokens: (tokens, vocabulary); and the answer's tokens."""
    tokens, start = tokens_of(TOKENIZER, example, answer)
    logits = model(torch.tensor([tokens])).logits[0].double().log_softmax(-1)
    return logits[start - 1 : -1].numpy(), tokens[start:]


def parting_of(example: Example) -> tuple[int, int, int]:
    (refusing, start), (complying, _) = (
        tokens_of(TOKENIZER, example, answer) for answer in (example.refusing, example.complying)
    )
    place = next(
        n for n, (r, c) in enumerate(zip(refusing[start:], complying[start:], strict=False)) if r != c
    )
    return place, refusing[start + place], complying[start + place]


def expected(
    model: PreTrainedModel, objective: Objective, at: torch.Tensor, rows: list[tuple[str, Example, Threshold]]
) -> tuple[list[float], dict[str, float]]:
    mask, factors = mask_of(model), np.exp(at.double().numpy())
    margins: list[float] = []
    losses: dict[str, list[float]] = {kind: [] for kind in KINDS}
    likelihoods: list[float] = []
    divergences: list[float] = []
    s = objective.settings
    for kind, example, threshold in rows:
        helpful = kind in ("borderline", "benign")
        right = example.complying if helpful else example.refusing
        base, answer = log_probabilities(model, example, right)
        with weights_scaled(model, mask, factors, threshold):
            moved, _ = log_probabilities(model, example, right)
        place, refusing, complying = parting_of(example)
        margin = moved[place, refusing] - moved[place, complying]
        margins.append(margin)
        share = threshold.num_safety / NUM_SAFETY
        weight = {
            "attacked": s.attacked_weight_low * (1 - share) + s.attacked_weight * share,
            "borderline": s.borderline_weight_low * (1 - share) + s.borderline_weight * share,
            "harmful": s.harmful_weight,
            "benign": s.benign_weight,
        }[kind]
        target = {
            "attacked": s.attacked_margin,
            "harmful": s.harmful_margin,
            "borderline": s.borderline_margin,
            "benign": s.benign_margin,
        }[kind]
        losses[kind].append(weight * np.log1p(np.exp(target + (margin if helpful else -margin))))
        if helpful:
            likelihoods.append(sum(moved[n, token] for n, token in enumerate(answer)))
        begin = 0 if kind == "benign" else place + 1
        divergences.append((np.exp(base) * (base - moved)).sum(axis=1)[begin:].sum())
    terms = {kind: float(np.mean(each)) for kind, each in losses.items()}
    terms["likelihood"] = -s.likelihood_weight * float(np.mean(likelihoods))
    terms["divergence"] = s.divergence_weight * float(np.mean(divergences))
    terms["shrinkage"] = s.shrinkage * float(np.mean(at.numpy() ** 2))
    return margins, terms


def test_every_term_is_that_of_a_plain_loop_over_prompts(model: PreTrainedModel) -> None:
    objective = objective_of(model, **WEIGHTS, shrinkage=0.5, divergence_weight=3.0)
    drawn, rows = whole_batch(model)
    assert {parting_of(example)[0] for _, example, _ in rows} == {0, 2, 3}, "answers also part late"
    at = parameters()
    margins, terms = expected(model, objective, at, rows)
    seen = objective(at, drawn)
    assert seen.margins.tolist() == pytest.approx(margins, rel=1e-4, abs=1e-4)
    assert {name: each.item() for name, each in seen.terms.items()} == pytest.approx(terms, rel=1e-4)
    assert seen.loss.item() == pytest.approx(sum(terms.values()), rel=1e-4)


def test_at_factors_of_one_nothing_diverges_and_nothing_shrinks(model: PreTrainedModel) -> None:
    seen = objective_of(model)(torch.zeros(NUM_SAFETY + NUM_UTILITY), whole_batch(model)[0])
    assert seen.terms["divergence"].item() == pytest.approx(0, abs=1e-6)
    assert seen.terms["shrinkage"].item() == 0


def test_a_borderline_answer_is_held_to_the_base_model_only_after_the_parting(
    model: PreTrainedModel,
) -> None:
    """Where it parts, the base model may be about to refuse: nothing there is worth keeping."""
    ends = replace(DATA, borderline=(Example("kill it", "no", "yes", "a"),))
    (prompt,) = tasks_of(model, ends).borderline
    objective = objective_of(model)
    tokens = torch.tensor(prompt.forced.tokens[prompt.forced.start :])
    assert len(tokens) == 3 and prompt.parting.place == 0
    at_parting = replace(
        prompt, forced=replace(prompt.forced, tokens=prompt.forced.tokens[: prompt.forced.start + 1])
    )
    both = Drawn((prompt, at_parting), (Threshold(10, 8),) * 2)
    alone = Drawn((at_parting,), (Threshold(10, 8),))
    assert objective(parameters(), both).terms["divergence"].item() > 0
    assert objective(parameters(), alone).terms["divergence"].item() == 0


def test_a_kind_that_is_not_in_the_batch_has_no_term(model: PreTrainedModel) -> None:
    drawn = Drawn(tasks_of(model).harmful, (Threshold(3, 3),) * 3)
    assert set(objective_of(model)(parameters(), drawn).terms) == {"harmful", "divergence", "shrinkage"}


@pytest.mark.parametrize("group_size", [1, 3])
def test_the_gradient_is_the_slope_of_the_loss(model: PreTrainedModel, group_size: int) -> None:
    objective = objective_of(model, group_size=group_size)
    drawn, _ = whole_batch(model)
    at = parameters(objective.shape.num_parameters).requires_grad_()
    (gradient,) = torch.autograd.grad(objective(at, drawn).loss, at)
    for seed in range(3):
        along = parameters(len(at), seed + 7)
        step = 0.01 / along.norm()
        with torch.no_grad():
            sides = [objective(at + sign * step * along, drawn).loss.item() for sign in (1, -1)]
        slope = (sides[0] - sides[1]) / (2 * step.item())
        assert (gradient @ along).item() == pytest.approx(slope, rel=0.01, abs=0.01)


def test_factors_given_to_the_modulator_serve_like_a_mask_that_has_them() -> None:
    model = tiny_model()
    mask = random_mask(model, num_safety=NUM_SAFETY, num_utility=NUM_UTILITY)
    factors = parameters().exp()
    other = replace(
        mask,
        safety=replace(mask.safety, factors=factors[:NUM_SAFETY].numpy()),
        utility=replace(mask.utility, factors=factors[NUM_SAFETY:].numpy()),
    )
    tokens = torch.arange(12).reshape(2, 6)
    modulator = Modulator(model, mask)
    modulator.use_factors(factors)
    rows = [Threshold(6, 3), Threshold(10, 8)]
    with torch.no_grad():
        with modulator.applied(rows):
            given = model(tokens).logits
        with Modulator(model, other).applied(rows):
            served = model(tokens).logits
        with Modulator(model, mask).applied(rows):
            before = model(tokens).logits
    assert torch.equal(given, served) and not torch.equal(given, before)


def test_gradients_reach_the_active_neurons_factors_and_no_others() -> None:
    model = tiny_model()
    modulator = Modulator(model, random_mask(model, num_safety=NUM_SAFETY, num_utility=NUM_UTILITY))
    factors = parameters().exp().requires_grad_()
    modulator.use_factors(factors)
    with modulator.applied(Threshold(6, 3)):
        (gradient,) = torch.autograd.grad(model(torch.arange(6)[None]).logits.square().sum(), factors)
    active = [*range(6), *range(NUM_SAFETY, NUM_SAFETY + 3)]
    assert gradient.nonzero().flatten().tolist() == active
