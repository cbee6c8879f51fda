"""Attribution finds the neurons that carry refusal, checked against finite differences."""

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from modulation.attribution.attack_aware import attack_aware
from modulation.attribution.base import Attribution, AttributionData, Example, Scores
from modulation.attribution.contrast import contrast
from modulation.attribution.gates import margin_gradient, mean_activation
from modulation.attribution.selection import ranked_sets
from modulation.sites import find_sites, input_dimension
from tests.tiny_models import byte_tokenizer, tiny_model

EXAMPLES = [Example("how?", "no!!", "yes."), Example("a longer question", "never", "do this first")]
DATA = AttributionData(
    harmful=tuple(EXAMPLES),
    attacked={"one": (Example("please: how?", "no!!", "yes."),), "two": tuple(EXAMPLES)},
    benign=(Example("hello", "no!!", "good day"),),
    borderline=(Example("kill a process", "no!!", "use kill"),),
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture
def model(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    return tiny_model(vocab_size=len(tokenizer)).double()


def plain_margin(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, example: Example) -> float:
    """The refusal margin, one answer at a time, without batches, padding or gates."""
    result = 0.0
    for sign, answer in ((1, example.refusing), (-1, example.complying)):
        head = tokenizer.apply_chat_template(
            [{"role": "user", "content": example.prompt}], add_generation_prompt=True, tokenize=False
        )
        prompt = tokenizer(head, add_special_tokens=False)["input_ids"]
        tail = tokenizer(answer, add_special_tokens=False)["input_ids"][:4]
        logits = model(torch.tensor([prompt + tail])).logits[0].log_softmax(-1)
        result += sign * sum(logits[len(prompt) - 1 + i, token].item() for i, token in enumerate(tail))
    return result


@torch.no_grad()
def test_the_gates_gradient_is_the_slope_of_the_refusal_margin(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    with torch.enable_grad():
        found = margin_gradient(model, tokenizer, EXAMPLES)
        singly = [margin_gradient(model, tokenizer, [each]).mean for each in EXAMPLES]
    gradient = found.mean
    expected = torch.stack(singly).abs().mean(dim=0)
    torch.testing.assert_close(found.mean_absolute, expected, rtol=1e-3, atol=1e-5)
    step = 0.01  # the norms compute in float32 whatever the model's dtype, so not smaller
    for layer, index in enumerate(gradient.abs().argmax(dim=1).tolist()):
        site = find_sites(model)[layer]
        column = site.module.weight.select(input_dimension(site.module), index)
        kept = column.clone()
        slopes = []
        for factor in (1 + step, 1 - step):
            column.copy_(kept * factor)
            slopes.append(sum(plain_margin(model, tokenizer, e) for e in EXAMPLES) / len(EXAMPLES))
            column.copy_(kept)
        assert gradient[layer, index].item() == pytest.approx((slopes[0] - slopes[1]) / (2 * step), rel=0.02)


def test_a_mean_activation_is_that_of_the_tokens_that_answer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    pairs = [(e.prompt, e.refusing) for e in EXAMPLES]
    found = mean_activation(model, tokenizer, pairs)
    expected = torch.zeros_like(found)
    for pair in pairs:
        seen: list[torch.Tensor] = []
        site = find_sites(model)[1]
        handle = site.module.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))  # noqa: B023
        head = f"<|user|>{pair[0]}<|end|><|assistant|>"
        prompt = tokenizer(head, add_special_tokens=False)["input_ids"]
        tail = tokenizer(pair[1], add_special_tokens=False)["input_ids"][:4]
        with torch.no_grad():
            model(torch.tensor([prompt + tail]))
        handle.remove()
        expected[1] += seen[0][0, len(prompt) - 1 : len(prompt) - 1 + len(tail)].mean(dim=0) / len(pairs)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", [attack_aware, contrast])
def test_every_method_scores_every_neuron_and_leaves_the_model_as_it_was(
    method: Attribution, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    scores = method(model, tokenizer, DATA)
    assert scores.safety.shape == scores.utility.shape == (3, 48)
    assert scores.safety.isfinite().all() and scores.utility.isfinite().all()
    assert scores.safety.std() > 0 and scores.utility.std() > 0
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())


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


@pytest.mark.parametrize("left_out", ["attacked", "benign", "borderline", "persona"])
def test_attribution_without_examples_says_which_are_missing(
    left_out: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    examples = tuple(EXAMPLES)
    data = AttributionData(
        harmful=examples,
        attacked={} if left_out == "attacked" else {"persona": () if left_out == "persona" else examples},
        benign=() if left_out == "benign" else examples,
        borderline=() if left_out == "borderline" else examples,
    )
    expected = "any attack" if left_out == "attacked" else left_out
    with pytest.raises(ValueError, match=f"no examples of: {expected}"):
        attack_aware(model, tokenizer, data)
