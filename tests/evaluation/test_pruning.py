"""Pruning against weights whose columns are set to zero by hand, and that it always ends."""

import copy

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from modulation.errors import DataError, ModulationError
from modulation.evaluation.answering import transformers_answerer
from modulation.evaluation.data import Record
from modulation.evaluation.metrics import evaluate_answers
from modulation.evaluation.pruning import (
    num_measured,
    pruned,
    pruned_metrics,
    pruning_table,
    random_ranking,
    read_counts,
    safety_ranking,
)
from modulation.levels import Threshold
from modulation.modulator import Modulator
from modulation.sites import find_sites, input_dimension
from tests.tiny_models import LAYERS, VOCAB, WIDTH, byte_tokenizer, random_mask, tiny_model

TOKENS = torch.randint(3, VOCAB, (2, 7), generator=torch.Generator().manual_seed(5))
NEURONS = np.array([[0, 3], [2, 47], [2, 0], [0, 3]], np.int32)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_pruning_is_a_column_of_zeros_in_the_output_projection(family: str) -> None:
    model = tiny_model(family)
    bare = model(TOKENS).logits
    cut = copy.deepcopy(model)
    for layer, index in NEURONS.tolist():
        module = find_sites(cut)[layer].module
        module.weight.select(input_dimension(module), index).zero_()  # type: ignore[operator, union-attr]
    with pruned(model, NEURONS):
        found = model(TOKENS).logits
    torch.testing.assert_close(found, cut(TOKENS).logits, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found, bare)
    assert torch.equal(model(TOKENS).logits, bare)


@torch.no_grad()
@pytest.mark.parametrize("pruned_first", [True, False])
def test_no_level_brings_a_pruned_neuron_back(pruned_first: bool) -> None:
    """Zero times any factor is zero, whichever of the two hooks comes first; the others keep theirs."""
    model = tiny_model()
    mask = random_mask(model)
    modulator, top = Modulator(model, mask), mask.safety.neurons[:5]
    cut = copy.deepcopy(model)
    for layer, index in top.tolist():
        find_sites(cut)[layer].module.weight[:, index] = 0.0
    for layer, index, factor in [
        *(pair for pair in zip(*mask.safety.neurons.T, mask.safety.factors, strict=True)),
        *(pair for pair in zip(*mask.utility.neurons[:4].T, mask.utility.factors[:4], strict=True)),
    ]:
        find_sites(cut)[layer].module.weight[:, index] *= float(factor)
    blocks = [pruned(model, top), modulator.applied(Threshold(12, 4))]
    first, second = blocks if pruned_first else reversed(blocks)
    with first, second:
        found = model(TOKENS).logits
    torch.testing.assert_close(found, cut(TOKENS).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_neuron_that_is_not_a_number_is_still_zero() -> None:
    model = tiny_model()
    seen: list[torch.Tensor] = []
    module = find_sites(model)[0].module
    with pruned(model, NEURONS):
        module.register_forward_pre_hook(lambda _module, arguments: seen.append(arguments[0]))
        activations = torch.full((1, 2, WIDTH), torch.nan)
        module(activations)
    assert (seen[0][..., 3] == 0).all() and seen[0].isnan().sum() == 2 * (WIDTH - 1)


@torch.no_grad()
def test_hooks_come_off_however_the_block_ends() -> None:
    model = tiny_model()
    before = {name: each.clone() for name, each in model.named_parameters()}
    with pytest.raises(RuntimeError, match="boom"), pruned(model, NEURONS):
        raise RuntimeError("boom")
    with pytest.raises(ModulationError, match=r"layer 3.*layers 0-2 of neurons 0-47"):
        pruned(model, np.array([[3, 0]], np.int32)).__enter__()
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(each, before[name]) for name, each in model.named_parameters())


@torch.no_grad()
def test_a_forward_pass_that_goes_past_a_site_is_noticed() -> None:
    model = tiny_model()
    with pytest.raises(ModulationError, match=r"model\.layers\.2.*cannot be pruned"), pruned(model, NEURONS):
        find_sites(model)[2].module._forward_pre_hooks.clear()
        model(TOKENS)


def test_the_ranking_goes_on_behind_the_set_by_score() -> None:
    mask = random_mask(tiny_model())
    assert np.array_equal(safety_ranking(mask), mask.safety.neurons)
    scores = np.random.default_rng(1).normal(size=(LAYERS, WIDTH))
    found = [tuple(each) for each in safety_ranking(mask, scores).tolist()]
    members = [tuple(each) for each in mask.safety.neurons.tolist()]
    utility = {tuple(each) for each in mask.utility.neurons.tolist()}
    everything = [(layer, index) for layer in range(LAYERS) for index in range(WIDTH)]
    rest = [each for each in everything if each not in utility and each not in members]
    assert found == members + sorted(rest, key=lambda each: -scores[each])


def test_random_neurons_are_of_neither_set_from_the_same_layers_and_drawn_by_the_seed() -> None:
    mask = random_mask(tiny_model())
    members = {tuple(each) for each in [*mask.safety.neurons.tolist(), *mask.utility.neurons.tolist()]}
    one, same, other = (random_ranking(mask, seed).tolist() for seed in (0, 0, 1))
    assert one == same != other
    assert {tuple(each) for each in one} == {tuple(each) for each in other}
    for found in (one, other):
        assert [layer for layer, _ in found[:12]] == [layer for layer, _ in mask.safety.neurons.tolist()]
    assert len(one) == LAYERS * WIDTH - len(members) and not members & {tuple(each) for each in one}


def test_counts_are_numbers_or_shares_of_the_safety_set() -> None:
    assert read_counts("0, 5,1,25%,50%,100%,3", 10) == [0, 1, 3, 5, 10]
    for wrong in ("", "x", "-1", "5%%", "1.5", "\u0663", "9" * 30):
        with pytest.raises(DataError, match=r"not understood; accepted: whole numbers"):
            read_counts(f"0,{wrong}", 10)


def test_every_level_ranking_and_count_is_measured_with_its_neurons_pruned() -> None:
    tokenizer: PreTrainedTokenizerFast = byte_tokenizer()
    model = tiny_model(vocab_size=len(tokenizer))
    mask = random_mask(model)
    records = [Record(str(n), f"prompt {n}", "harmful", "fiction") for n in range(3)]
    records += [Record("b", "hello", "benign", answer="hi")]
    levels = [mask.levels.parse(name) for name in ("off", "security-critical")]
    rankings = {"safety": safety_ranking(mask), "random 0": random_ranking(mask, 0)}
    answered: list[int] = []
    modulator = Modulator(model, mask)
    points = pruned_metrics(
        modulator, tokenizer, records, levels, [0, 4, 12], rankings,
        max_new_tokens=4, on_answered=answered.append,
    )  # fmt: skip
    assert [(p["level"], p["pruned"], p["num_pruned"]) for p in points] == [
        (level, kind, count)
        for level in ("off", "security-critical")
        for kind in rankings
        for count in (0, 4, 12)
    ]
    assert sum(answered) == num_measured(2, [0, 4, 12], 2) * len(records) == 10 * len(records)
    answer = transformers_answerer(model, tokenizer, max_new_tokens=4)
    for point in points:
        threshold = mask.levels.parse(point["level"]).threshold
        with pruned(model, rankings[point["pruned"]][: point["num_pruned"]]), modulator.applied(threshold):
            expected = evaluate_answers(records, answer([record.prompt for record in records]))
        assert point["figures"]["asr"] == expected["asr"]
        assert point["figures"]["perplexity"]["num_tokens"] == 3
    perplexities = {point["figures"]["perplexity"]["perplexity"] for point in points}
    assert len(perplexities) == len(points) - 2  # nothing pruned is the same under both rankings
    table = pruning_table(points, "asr").splitlines()
    assert table[0] == (
        "| neurons pruned | `off`, safety | `off`, random 0 "
        "| `security-critical`, safety | `security-critical`, random 0 |"
    )
    assert [line.split("|")[1].strip() for line in table[2:]] == ["0", "4", "12"]
    assert all(line.count("(3/3)") == 4 for line in table[2:])


def test_more_neurons_than_there_are_are_refused_before_anything_is_answered() -> None:
    model = tiny_model()
    mask = random_mask(model)
    with pytest.raises(DataError, match=r"13 neurons cannot be pruned.*'safety' holds 12; accepted: 0 to 12"):
        pruned_metrics(
            Modulator(model, mask),
            byte_tokenizer(),
            [],
            [*mask.levels],
            [13],
            {"safety": safety_ranking(mask)},
        )
