"""A few steps of the recipe: it learns, it is repeatable, and what it writes loads as a chat model."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from modulation.demo.corpus import STAGE_ONE, STAGE_TWO, dialogues
from modulation.demo.training import Recipe, Stage, new_model, run_stage, save
from modulation.demo.vocabulary import IGNORED_LABEL, encode_dialogue, train_tokenizer

STAGES = (
    Stage("one", STAGE_ONE, num_steps=5, batch_size=4, learning_rate=3e-3, warmup_steps=2, final_share=0.1),
    Stage("two", STAGE_TWO, num_steps=1, batch_size=4, learning_rate=1e-3, warmup_steps=1, final_share=0.1),
)
RECIPE = replace(Recipe(), stages=STAGES)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(dialogues(0, 2000, STAGE_ONE))


def _train(tokenizer: PreTrainedTokenizerFast, seed: int) -> tuple[dict[str, torch.Tensor], list[float]]:
    model = new_model(tokenizer, seed)
    losses: list[float] = []
    for stage in STAGES:
        run_stage(model, tokenizer, stage, RECIPE, seed, lambda *step: losses.append(step[-1]))
    return model.state_dict(), losses


def test_a_few_steps_lower_the_loss_and_the_same_seed_repeats_them(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    weights, losses = _train(tokenizer, seed=1)
    again, losses_again = _train(tokenizer, seed=1)
    assert len(losses) == 6 and losses[-1] < losses[0] - 0.3
    assert losses_again == pytest.approx(losses, rel=1e-4)
    for name, values in weights.items():
        torch.testing.assert_close(again[name], values, rtol=1e-3, atol=1e-4)


def test_another_seed_gives_another_model(tokenizer: PreTrainedTokenizerFast) -> None:
    one, other = (new_model(tokenizer, seed).model.embed_tokens.weight for seed in (0, 1))
    assert not torch.equal(one, other)


def test_training_tokens_are_those_of_the_chat_template(tokenizer: PreTrainedTokenizerFast) -> None:
    for dialogue in dialogues(5, 200, STAGE_TWO):
        ids, labels = encode_dialogue(tokenizer, dialogue)
        assert ids == tokenizer.apply_chat_template(dialogue, return_dict=False)
        assert len(labels) == len(ids)


def test_only_the_assistants_words_and_turn_ends_are_learned(tokenizer: PreTrainedTokenizerFast) -> None:
    dialogue = [
        {"role": "system", "content": "Answer briefly."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "Thanks"},
        {"role": "assistant", "content": "You are welcome!"},
    ]
    _, labels = encode_dialogue(tokenizer, dialogue)
    learned = [label for label in labels if label != IGNORED_LABEL]
    assert tokenizer.decode(learned) == "Hello!<|im_end|>You are welcome!<|im_end|>"


@pytest.mark.parametrize("text", ["Grüße, 世界!", "\t tab\r\n", "{x} \\ <|im", "naïve 🙂"])
def test_any_text_survives_the_tokenizer(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_saved_folder_loads_with_its_template_and_keeps_the_model_card(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "README.md").write_text("card")
    model = new_model(tokenizer, 0)
    save(model, tokenizer, folder)
    save(model, tokenizer, folder)

    assert (folder / "README.md").read_text() == "card"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 10e6
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert loaded.dtype == torch.bfloat16
    assert loaded.generation_config.eos_token_id == tokenizer.eos_token_id
    messages = [{"role": "developer", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    text = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    assert text == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
