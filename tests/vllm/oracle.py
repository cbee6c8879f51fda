"""What the demo model answers by plain transformers with hooks, one conversation at a time, in float32."""

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from modulation.demo import MASK_FILE, MODEL_DIR
from modulation.levels import Threshold
from modulation.masks import Mask
from modulation.modulator import Modulator
from server.engines.base import Chat


def greedy(
    chats: Sequence[Chat], thresholds: Sequence[Threshold], length: int, weights: Path | None = None
) -> dict[tuple[int, Threshold], tuple[int, ...]]:
    """The tokens of every chat's answer at every threshold, the token that ends it included. Where all of a
    chat's thresholds are in one batch, its rows are equally long: nothing is padded. `weights`: a folder with
    others than the demo model's, to which its mask is applied all the same."""
    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    modulator = Modulator(model, Mask.load(MASK_FILE))
    if weights is not None:
        model.load_state_dict(AutoModelForCausalLM.from_pretrained(weights, dtype=torch.float32).state_dict())
    found = {}
    for number, chat in enumerate(chats):
        turns = [{"role": each.role, "content": each.content} for each in chat.messages]
        text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        row = tokenizer(text, add_special_tokens=False)["input_ids"]
        prompts = torch.tensor([row] * len(thresholds))
        with modulator.applied(list(thresholds)):
            answers = model.generate(
                prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=length, do_sample=False
            )
        for threshold, answer in zip(thresholds, answers[:, len(row) :].tolist(), strict=True):
            found[number, threshold] = _until(answer, int(model.generation_config.eos_token_id))
    return found


def _until(tokens: list[int], end: int) -> tuple[int, ...]:
    return tuple(tokens[: tokens.index(end) + 1] if end in tokens else tokens)
