"""Text quality against arithmetic written out: NumPy, one answer at a time, no batches, no padding."""

import math
import statistics

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from modulation.demo import MODEL_DIR
from modulation.errors import ModelError
from modulation.evaluation.answering import transformers_answerer
from modulation.evaluation.data import Record
from modulation.evaluation.levels import answering_in_process, perplexity_in_process
from modulation.evaluation.perplexity import end_of_turn, perplexity
from modulation.evaluation.quality import repeated_share, text_quality
from modulation.levels import Threshold
from modulation.loading import load_tokenizer
from modulation.modulator import Modulator
from tests.tiny_models import byte_tokenizer, random_mask, tiny_model

END = 1  # <|end|> of the byte tokenizer
RECORDS = [
    Record("1", "how?", "benign", answer="like this"),
    Record("2", "a much longer question, with words", "borderline", answer="no"),
    Record("3", "hello", "benign", answer=""),
    Record("4", "kill", "harmful", answer="this one complies and is never counted"),
    Record("5", "no answer was written", "benign"),
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture
def model(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    return tiny_model(vocab_size=len(tokenizer))


def oracle(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, pairs: list[tuple[str, str]]) -> float:
    nats, number = 0.0, 0
    for prompt, answer in pairs:
        ids = tokenizer(f"<|user|>{prompt}<|end|><|assistant|>", add_special_tokens=False)["input_ids"]
        for token in [*tokenizer(answer, add_special_tokens=False)["input_ids"], END]:
            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits[0, -1].double().numpy()
            nats -= logits[token] - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
            number += 1
            ids = [*ids, token]
    return math.exp(nats / number)


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_perplexity_is_that_of_each_answers_tokens_one_by_one(
    batch_size: int, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    done: list[int] = []
    found = perplexity(model, tokenizer, RECORDS, batch_size=batch_size, on_done=done.append)
    assert found is not None and sum(done) == 3
    assert (found["num_answers"], found["num_tokens"]) == (3, len("like this") + len("no") + 3)
    expected = oracle(model, tokenizer, [(r.prompt, r.answer or "") for r in RECORDS[:3]])
    assert found["perplexity"] == pytest.approx(expected, rel=1e-5)


def test_perplexity_of_benign_answers_alone(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    found = perplexity(model, tokenizer, RECORDS, kinds=("benign",))
    assert found is not None and found["num_answers"] == 2
    expected = oracle(model, tokenizer, [("how?", "like this"), ("hello", "")])
    assert found["perplexity"] == pytest.approx(expected, rel=1e-5)


def test_perplexity_inside_a_modulation_is_that_of_the_modulated_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    bare = perplexity(model, tokenizer, RECORDS)
    with Modulator(model, random_mask(model)).applied(Threshold(12, 9)):
        found = perplexity(model, tokenizer, RECORDS, batch_size=2)
        expected = oracle(model, tokenizer, [(r.prompt, r.answer or "") for r in RECORDS[:3]])
    assert found is not None and bare is not None
    assert found["perplexity"] == pytest.approx(expected, rel=1e-5)
    assert abs(found["perplexity"] - bare["perplexity"]) > 0.01


def test_without_right_answers_there_is_no_perplexity(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    assert perplexity(model, tokenizer, RECORDS[3:]) is None


def test_a_model_that_is_broken_beyond_measure_has_an_infinite_perplexity(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    with torch.no_grad():
        model.lm_head.weight.mul_(1e6)  # type: ignore[union-attr, operator]
    found = perplexity(model, tokenizer, RECORDS)
    assert found is not None and found["perplexity"] == math.inf


def test_the_end_of_a_turn_is_what_the_template_puts_after_an_answer() -> None:
    tokenizer = byte_tokenizer()
    assert end_of_turn(tokenizer) == END
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} \n<|user|>{% endfor %}"
    assert end_of_turn(tokenizer) == tokenizer.convert_tokens_to_ids("<|user|>")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    assert end_of_turn(tokenizer) == tokenizer.eos_token_id
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="no end-of-turn token"):
        end_of_turn(tokenizer)
    demo = load_tokenizer(str(MODEL_DIR))
    assert end_of_turn(demo) == demo.convert_tokens_to_ids("<|im_end|>")


@pytest.mark.parametrize(
    ("answer", "num_repeated", "num_ngrams"),
    [
        ("", 0, 1),
        ("one two three", 0, 1),
        ("one two three four five", 0, 2),
        ("no no no no no no", 2, 3),
        ("NO no No nO no", 1, 2),
        ("!!!!!!", 2, 3),
        ("a b c d, a b c d, a b c d,", 7, 12),
        ("\u662f\u662f\u662f\u662f\u662f", 1, 2),
    ],
)
def test_the_repeated_share_counts_4_grams_that_stood_there_before(
    answer: str, num_repeated: int, num_ngrams: int
) -> None:
    assert repeated_share(answer) == pytest.approx(num_repeated / num_ngrams)


def test_text_quality_counts_looping_and_empty_answers_and_words() -> None:
    answers = ["no no no no no no no no", "Use a hoe, then water.", "", "Fine."]
    found = text_quality(answers)
    looping = found["repetition"]["looping"]
    assert (looping["count"], looping["total"]) == (1, 4)
    assert found["repetition"]["mean"] == pytest.approx((4 / 5) / 4)
    lengths = [8, 5, 0, 1]
    assert found["length"] == {
        "mean_words": statistics.fmean(lengths),
        "median_words": 3.0,
        "num_empty": 1,
        "num_answers": 4,
    }
    with pytest.raises(ValueError, match="at least one"):
        text_quality([])


def test_a_level_is_answered_and_measured_under_the_modulated_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    mask = random_mask(model)
    modulator = Modulator(model, mask)
    found: dict[int, str] = {}
    prompts = [record.prompt for record in RECORDS]
    answering_in_process(modulator, tokenizer, mask.levels, 5, 2)(
        "security-critical", prompts, found.__setitem__
    )
    measure = perplexity_in_process(modulator, tokenizer, mask.levels, 2)
    figures = measure("security-critical", RECORDS, [])
    with modulator.applied(mask.levels.parse("security-critical").threshold):
        answer = transformers_answerer(model, tokenizer, max_new_tokens=5, batch_size=2)
        assert [found[row] for row in range(len(RECORDS))] == answer(prompts)
        assert figures == {"perplexity": perplexity(model, tokenizer, RECORDS, 2, kinds=("benign",))}
    assert figures["perplexity"]["num_answers"] == 2
    assert measure("off", RECORDS[3:4], []) == {}
    assert not any(module._forward_pre_hooks for module in model.modules())
