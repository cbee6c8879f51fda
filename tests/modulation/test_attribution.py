"""Every attribution method against an oracle that shares no code with it, on tiny random models."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from modulation.attribution.accumulate import Accumulator
from modulation.attribution.attack_aware import attack_aware
from modulation.attribution.base import AttributionData, Example, Scores
from modulation.attribution.contrast import contrast
from modulation.attribution.contrastive_pairs import contrastive_pairs
from modulation.attribution.methods import METHODS
from modulation.attribution.random_scores import random_scores
from modulation.attribution.selection import ranked_sets
from modulation.attribution.set_difference import set_difference
from modulation.errors import DataError, NeuronTuneError
from modulation.sites import find_sites, input_dimension
from tests.modulation.attributing import (
    DATA,
    ONE,
    TOKENIZER,
    TWO,
    activations,
    double_model,
    margin,
    scaled,
    tokens_of,
)
from tests.tiny_models import FAMILIES, LAYERS, WIDTH, tiny_model

STEP = 0.01  # the norms compute in float32 whatever the model's dtype, so not smaller


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return double_model()


def attribute(method: Any, model: PreTrainedModel, data: AttributionData = DATA, **options: Any) -> Scores:
    """With batches of two, so that examples of different lengths meet and groups do not divide evenly."""
    found = method(model, TOKENIZER, data, Accumulator(batch_size=2), **options)
    assert isinstance(found, Scores)
    return found


def slopes(
    model: PreTrainedModel, examples: tuple[Example, ...], neuron: tuple[int, int], what: Callable[..., float]
) -> np.ndarray:
    """How `what` of each example changes with a gate on the neuron: central differences (examples,)."""
    sides = []
    for factor in (1 + STEP, 1 - STEP):
        with scaled(model, *neuron, factor):
            sides.append(np.array([what(model, each) for each in examples]))
    return (sides[0] - sides[1]) / (2 * STEP)


def strongest(scores: Tensor) -> list[tuple[int, int]]:
    """One neuron of every layer."""
    return list(enumerate(scores.abs().argmax(dim=1).tolist()))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("quantile", [0.0, 0.3])
def test_under_attack_a_neuron_counts_by_a_low_slope_of_the_margin_less_its_cost(
    family: str, quantile: float
) -> None:
    model = double_model(family)
    found = attribute(
        attack_aware, model, benign_weight=0.6, borderline_weight=0.3, cost="absolute",
        direction="amplify", text_weight=0.0, quantile=quantile,
    )  # fmt: skip
    for neuron in strongest(found.safety):
        groups = (DATA.harmful, *DATA.attacked.values())
        low = np.quantile([slopes(model, each, neuron, margin).mean() for each in groups], quantile)
        benign, borderline = (
            np.abs(slopes(model, examples, neuron, margin)).mean()
            for examples in (DATA.benign, DATA.borderline)
        )
        expected = low - 0.6 * benign - 0.3 * borderline
        assert found.safety[neuron].item() == pytest.approx(expected, rel=0.02, abs=0.005)


def test_the_cost_can_be_what_a_neuron_does_on_average(model: PreTrainedModel) -> None:
    found = attribute(
        attack_aware, model, cost="positive", include_plain=False, utility="complying",
        benign_weight=0.7, borderline_weight=0.25, direction="amplify", text_weight=0.0,
    )  # fmt: skip
    for neuron in [*strongest(found.safety), *strongest(found.utility)]:
        groups = [slopes(model, each, neuron, margin).mean() for each in DATA.attacked.values()]
        benign, borderline = (
            slopes(model, examples, neuron, margin).mean() for examples in (DATA.benign, DATA.borderline)
        )
        safety = np.quantile(groups, 0.25) - 0.7 * max(0, benign) - 0.25 * max(0, borderline)
        utility = -np.quantile(groups, 0.75) - 0.7 * max(0, -benign) - 0.25 * max(0, -borderline)
        assert found.safety[neuron].item() == pytest.approx(safety, rel=0.02, abs=0.005)
        assert found.utility[neuron].item() == pytest.approx(utility, rel=0.02, abs=0.005)


def log_odds(model: PreTrainedModel, example: Example, answer: str) -> float:
    """Of every token of the answer, log p / (1 - p), their mean, one token at a time."""
    tokens, start = tokens_of(TOKENIZER, example, answer)
    with torch.no_grad():
        shares = model(torch.tensor([tokens])).logits[0].double().softmax(-1)
    each = [shares[place - 1, tokens[place]].item() for place in range(start, len(tokens))]
    return float(np.mean([np.log(share / (1 - share)) for share in each]))


@pytest.mark.parametrize("kind", ["safety", "utility"])
def test_a_neuron_that_moves_the_words_of_right_answers_and_refusals_counts_less(
    model: PreTrainedModel, kind: str
) -> None:
    scores = [getattr(attribute(attack_aware, model, text_weight=weight), kind) for weight in (0.0, 0.5)]
    for neuron in strongest(scores[0]):
        words = [
            np.abs(slopes(model, examples, neuron, lambda m, e: log_odds(m, e, getattr(e, answer)))).mean()  # noqa: B023
            for examples, answer in ((DATA.benign, "complying"), (DATA.harmful, "refusing"))
        ]
        lost = (scores[0] - scores[1])[neuron].item()
        assert lost == pytest.approx(0.5 * sum(words), rel=0.02, abs=0.005)


@pytest.mark.parametrize("kind", ["safety", "utility"])
def test_in_either_direction_a_neuron_counts_by_the_better_of_scaling_it_up_and_down(
    model: PreTrainedModel, kind: str
) -> None:
    """Down is up with all slopes turned round."""
    found = getattr(attribute(attack_aware, model, text_weight=0.0, attack_weight=0.8), kind)
    for neuron in strongest(found):
        groups = {
            name: slopes(model, each, neuron, margin).mean()
            for name, each in {**DATA.attacked, "plain": DATA.harmful}.items()
        }
        benign, borderline = (
            slopes(model, examples, neuron, margin).mean() for examples in (DATA.benign, DATA.borderline)
        )
        attacks = np.mean([groups[name] for name in DATA.attacked])

        useful = -np.mean([benign, borderline])
        scores = [
            np.quantile([sign * each for each in groups.values()], 0.25)
            - 0.5 * max(0, sign * benign)
            - 0.5 * max(0, sign * borderline)
            if kind == "safety"
            else sign * useful - 0.8 * max(0, -sign * attacks)
            for sign in (1, -1)
        ]
        assert found[neuron].item() == pytest.approx(max(scores), rel=0.02, abs=0.005)


@pytest.mark.parametrize(("integrated", "start"), [("zero_to_one", 0.0), ("one_to_two", 1.0)])
def test_integrated_effects_of_all_neurons_add_up_to_what_all_gates_change(
    model: PreTrainedModel, integrated: str, start: float
) -> None:
    """Completeness (arXiv 1703.01365, proposition 1), which no implementation detail can fake."""
    data = replace(DATA, attacked={"one": (ONE,)})
    found = attribute(
        attack_aware, model, data, integrated=integrated, steps=32, include_plain=False,
        benign_weight=0.0, borderline_weight=0.0, text_weight=0.0, direction="amplify",
    )  # fmt: skip
    ends = []
    for factor in (start + 1, start):
        with scaled(model, 0, slice(None), factor), scaled(model, 1, slice(None), factor):
            with scaled(model, 2, slice(None), factor):
                ends.append(margin(model, ONE))
    assert found.safety.sum().item() == pytest.approx(ends[0] - ends[1], rel=0.02, abs=0.02)


def mean_of(model: PreTrainedModel, examples: tuple[Example, ...], answer: str) -> np.ndarray:
    found = []
    for each in examples:
        tokens, start = tokens_of(TOKENIZER, each, getattr(each, answer))
        tokens = tokens[: start + 4]
        layers = activations(model, tokens)
        found.append([layer[start - 1 : len(tokens) - 1].mean(dim=0).numpy() for layer in layers])
    return np.array(found).mean(axis=0)


def test_contrast_is_the_difference_of_means_over_the_tokens_that_answer(model: PreTrainedModel) -> None:
    found = attribute(contrast, model)
    refusing = mean_of(model, DATA.all_harmful, "refusing")
    complying = mean_of(model, DATA.all_harmful, "complying")
    np.testing.assert_allclose(found.safety, (refusing - complying) * np.sign(refusing), atol=1e-5)
    np.testing.assert_allclose(found.utility, (complying - refusing) * np.sign(complying), atol=1e-5)


def last_of(model: PreTrainedModel, examples: tuple[Example, ...]) -> np.ndarray:
    """Activations at the last token of prompts alone: (examples, layers, neurons)."""
    rows = []
    for each in examples:
        tokens, start = tokens_of(TOKENIZER, each, "")
        assert len(tokens) == start
        rows.append([layer[-1].numpy() for layer in activations(model, tokens)])
    return np.array(rows)


def test_contrastive_pairs_leave_out_what_fires_for_everything(model: PreTrainedModel) -> None:
    found = attribute(contrastive_pairs, model, universal_top=0.05, universal_share=0.6)
    harmful, benign = last_of(model, DATA.all_harmful), last_of(model, DATA.benign)
    size = np.abs(np.concatenate([harmful, benign])).reshape(len(harmful) + len(benign), -1)
    bar = np.sort(size, axis=1)[:, -round(0.05 * size.shape[1])]
    universal = (size >= bar[:, None]).mean(axis=0).reshape(LAYERS, WIDTH) > 0.6
    assert 0 < universal.sum() < 20
    difference = harmful.mean(axis=0) - benign.mean(axis=0)
    safety = np.where(universal, 0, difference * np.sign(harmful.mean(axis=0)))
    utility = np.where(universal, 0, -difference * np.sign(benign.mean(axis=0)))
    np.testing.assert_allclose(found.safety, safety, atol=1e-5)
    np.testing.assert_allclose(found.utility, utility, atol=1e-5)


def top(scores: np.ndarray, share: float) -> np.ndarray:
    count = round(share * scores.size)
    chosen = np.zeros(scores.size, dtype=bool)
    chosen[np.argsort(-scores.ravel())[:count]] = True
    return chosen.reshape(scores.shape)


def expected_difference(safety: np.ndarray, utility: np.ndarray, q: float, p: float) -> list[np.ndarray]:
    return [
        np.where(top(first, q) & ~top(second, p), first, 0)
        for first, second in ((safety, utility), (utility, safety))
    ]


def column_scores(model: PreTrainedModel, examples: tuple[Example, ...], answer: str) -> np.ndarray:
    """SNIP by autograd on the weights themselves, one example at a time, then summed by neuron."""
    total = np.zeros((LAYERS, WIDTH))
    for each in examples:
        tokens, start = tokens_of(TOKENIZER, each, getattr(each, answer))
        logits = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
        loss = sum((logits[i - 1, tokens[i]] for i in range(start, len(tokens))), torch.zeros(()))
        weights = [site.module.weight for site in find_sites(model)]
        for layer, (site, gradient) in enumerate(
            zip(find_sites(model), torch.autograd.grad(loss, weights), strict=True)
        ):
            product = (site.module.weight * gradient).abs()
            total[layer] += product.sum(dim=1 - input_dimension(site.module)).detach().numpy()
    return total / len(examples)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_snip_is_weight_times_gradient_summed_by_neuron(family: str) -> None:
    model = double_model(family)
    found = attribute(set_difference, model, q=0.3, p=0.2)
    useful = (*DATA.benign, *DATA.borderline)
    safety, utility = expected_difference(
        column_scores(model, DATA.all_harmful, "refusing"),
        column_scores(model, useful, "complying"),
        0.3,
        0.2,
    )
    np.testing.assert_allclose(found.safety, safety, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(found.utility, utility, rtol=1e-3, atol=1e-5)


def norms(model: PreTrainedModel, examples: tuple[Example, ...], answer: str) -> np.ndarray:
    found = np.zeros((LAYERS, WIDTH))
    for each in examples:
        tokens, start = tokens_of(TOKENIZER, each, getattr(each, answer))
        for layer, rows in enumerate(activations(model, tokens)):
            found[layer] += (rows[start - 1 : len(tokens) - 1].numpy() ** 2).sum(axis=0)
    return np.sqrt(found)


def test_wanda_is_weight_times_the_norm_of_activations(model: PreTrainedModel) -> None:
    found = attribute(set_difference, model, score="wanda", q=0.3, p=0.2)
    weights = np.array(
        [np.abs(site.module.weight.detach().numpy()).sum(axis=0) for site in find_sites(model)]
    )
    useful = (*DATA.benign, *DATA.borderline)
    safety, utility = expected_difference(
        weights * norms(model, DATA.all_harmful, "refusing"),
        weights * norms(model, useful, "complying"),
        0.3,
        0.2,
    )
    np.testing.assert_allclose(found.safety, safety, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.utility, utility, rtol=1e-4, atol=1e-5)


def test_random_scores_follow_the_seed_alone(model: PreTrainedModel) -> None:
    one, same, other = (attribute(random_scores, model, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.safety, same.safety) and torch.equal(one.utility, same.utility)
    assert not torch.equal(one.safety, other.safety) and not torch.equal(one.safety, one.utility)
    assert one.safety.min() > 0


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["gpt2", "opt", "falcon", "phi3"])
def test_every_method_takes_bfloat16_and_leaves_the_model_as_it_was(method: str, family: str) -> None:
    model = tiny_model(family, vocab_size=len(TOKENIZER)).bfloat16()
    frozen = next(iter(model.parameters()))
    frozen.requires_grad_(False)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    scores = attribute(METHODS[method], model)
    for values in (scores.safety, scores.utility):
        assert values.shape == (LAYERS, WIDTH) and values.dtype == torch.float32
        assert values.isfinite().all() and values.std() > 0
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [each for each in model.parameters() if not each.requires_grad] == [frozen]
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_bfloat16_loses_little_since_sums_are_float32() -> None:
    model = tiny_model(vocab_size=len(TOKENIZER))
    exact = attribute(attack_aware, model).safety.flatten()
    rough = attribute(attack_aware, model.bfloat16()).safety.flatten()
    assert torch.corrcoef(torch.stack([exact, rough]))[0, 1] > 0.98


@pytest.mark.parametrize("method", ["attack_aware", "contrast", "contrastive_pairs", "set_difference"])
def test_the_batch_size_changes_nothing_but_rounding(method: str, model: PreTrainedModel) -> None:
    options = {"q": 1.0, "p": 0.0} if method == "set_difference" else {}
    one, all_together = (
        METHODS[method](model, TOKENIZER, DATA, Accumulator(batch_size=size), **options) for size in (1, 9)
    )
    torch.testing.assert_close(one.safety, all_together.safety, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(one.utility, all_together.utility, rtol=1e-3, atol=1e-5)


NEEDED = {
    "attack_aware": {"harmful", "attacked", "benign", "borderline"},
    "contrast": {"harmful"},
    "contrastive_pairs": {"harmful", "benign"},
    "set_difference": {"harmful", "benign"},
    "random": set(),
}


@pytest.mark.parametrize("left_out", ["harmful", "attacked", "benign", "borderline"])
@pytest.mark.parametrize("method", METHODS)
def test_a_method_says_which_prompts_it_lacks(left_out: str, method: str, model: PreTrainedModel) -> None:
    data = replace(DATA, **{left_out: {} if left_out == "attacked" else ()})
    if left_out in NEEDED[method]:
        with pytest.raises(DataError, match=f"no {left_out} prompts: add records with kind"):
            attribute(METHODS[method], model, data)
    else:
        attribute(METHODS[method], model, data)


def test_what_has_no_weight_need_not_be_there(model: PreTrainedModel) -> None:
    data = replace(DATA, harmful=(), borderline=())
    attribute(
        attack_aware, model, data, include_plain=False, borderline_weight=0.0, helpful_borderline=0.0,
        text_weight=0.0,
    )  # fmt: skip
    with pytest.raises(DataError, match="helpful_borderline=0 do without"):
        attribute(attack_aware, model, data, include_plain=False, borderline_weight=0.0, text_weight=0.0)
    with pytest.raises(DataError, match="no harmful prompts"):
        attribute(attack_aware, model, replace(DATA, harmful=()), include_plain=False)


@pytest.mark.parametrize(
    ("method", "options", "words"),
    [
        ("attack_aware", {"utility": "nice"}, "utility='nice' is unknown; accepted: helpful, complying"),
        ("attack_aware", {"cost": "none"}, "cost='none' is unknown; accepted: absolute, positive"),
        ("attack_aware", {"direction": "down"}, "direction='down' is unknown; accepted: either, amplify"),
        ("attack_aware", {"integrated": "yes"}, "integrated='yes' is unknown; accepted: none, zero_to_one"),
        ("attack_aware", {"steps": 0}, "steps=0: at least 1"),
        ("attack_aware", {"helpful_borderline": 2.0}, "helpful_borderline=2: a share from 0 to 1"),
        ("attack_aware", {"quantile": 1.5}, "quantile=1.5: a share from 0 to 1"),
        ("attack_aware", {"margin_tokens": -1}, "margin_tokens=-1: a whole number from 0"),
        ("contrast", {"answer_tokens": -1}, "answer_tokens=-1: a whole number from 0"),
        ("contrastive_pairs", {"universal_top": 1.5}, "universal_top=1.5: a share from 0 to 1"),
        ("set_difference", {"score": "w"}, "score='w' is unknown; accepted: snip, wanda"),
        ("set_difference", {"q": -0.1}, "q=-0.1: a share from 0 to 1"),
        ("set_difference", {"answer_tokens": -1}, "answer_tokens=-1: a whole number from 0"),
    ],
)
def test_an_option_out_of_range_is_refused(
    method: str, options: dict[str, Any], words: str, model: PreTrainedModel
) -> None:
    with pytest.raises(DataError, match=words):
        attribute(METHODS[method], model, **options)


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"random"}))
def test_a_prompt_that_the_context_cannot_hold_is_refused_by_name(method: str) -> None:
    model = tiny_model(vocab_size=len(TOKENIZER), max_position_embeddings=64)
    data = replace(DATA, harmful=(ONE, TWO, Example("x" * 70, "no", "yes", "the long one")))
    with pytest.raises(DataError, match=r"'the long one': prompt and answer are 7\d tokens.* holds 64"):
        attribute(METHODS[method], model, data)


def test_a_model_that_bypasses_the_hooks_is_refused() -> None:
    """A fused MLP never calls its projection as a module: hooks would silently see nothing."""
    model = double_model()
    for site in find_sites(model)[1:]:
        site.module.__class__ = type("Fused", (type(site.module),), {"__call__": type(site.module).forward})
    for method in (attack_aware, contrast, set_difference):
        with pytest.raises(NeuronTuneError, match="went through 1 of 3 sites"):
            attribute(method, model)


def test_the_two_sets_are_ranked_and_disjoint() -> None:
    scores = Scores(
        safety=torch.tensor([[9.0, 8.0, -1.0], [7.0, 1.0, 0.0]]),
        utility=torch.tensor([[9.0, 0.5, 2.0], [8.0, 3.0, -4.0]]),
    )
    safety, utility = ranked_sets(scores, num_safety=9, num_utility=2)
    # (0, 0) leads both lists: at equal rank it is a safety neuron. (1, 0) ranks better as utility.
    assert safety.tolist() == [[0, 0], [0, 1]]
    assert utility.tolist() == [[1, 0], [1, 1]]


def test_a_neuron_that_one_set_does_not_take_is_left_to_the_other() -> None:
    scores = Scores(safety=torch.tensor([[9.0, 8.0, 7.0]]), utility=torch.tensor([[-5.0, -3.0, -1.0]]))
    safety, utility = ranked_sets(scores, num_safety=3, num_utility=3)
    assert safety[:, 1].tolist() == [0, 1, 2] and len(utility) == 0
    scores = Scores(safety=torch.tensor([[9.0, 8.0, 7.0]]), utility=torch.tensor([[3.0, 2.0, 1.0]]))
    safety, utility = ranked_sets(scores, num_safety=1, num_utility=2)
    assert safety[:, 1].tolist() == [0] and utility[:, 1].tolist() == [1, 2]
