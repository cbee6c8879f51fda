"""Every family that the docs name, on vLLM: tiny random models at several levels in one batch.

Eager, since compiling each would take minutes; compiled kernels are tested on the demo model.
"""

import asyncio
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

pytest.importorskip("vllm", reason="vLLM is not installed here; make test-vllm has it")

from modulation.errors import ModelError
from modulation.levels import ZERO, Threshold
from modulation.masks import Mask
from modulation.modulator import modulated
from server.engines.base import GenerateRequest
from server.engines.vllm import VllmEngine
from server.engines.vllm_arguments import VllmArguments
from tests.engines.contract import GREEDY, collect, tokens
from tests.tiny_models import FAMILIES, byte_tokenizer, random_mask, save_mask, tiny_model

FOREIGN = ("gpt_neox", "olmo2")
LENGTH = 12
Answer = tuple[tuple[int, ...], list[float]]
PROMPTS = (tuple(range(10, 40)), tuple(range(60, 71)), (7,) * 19)


def saved(family: str, folder: Path) -> tuple[Path, Path]:
    """A folder with a model of the family, and its mask outside of it."""
    tokenizer = byte_tokenizer()
    model = tiny_model(
        family, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
        hidden_size=128, head_dim=32, n_embd=128, word_embed_proj_dim=128,
        ffn_hidden_size=512,  # vLLM's falcon knows no other width
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 0.4 if parameter.ndim == 2 else 1.0  # or the widest are sure of every token
    place = folder / "model"
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place, save_mask(random_mask(model), folder)


def engine_of(family: str, folder: Path) -> VllmEngine:
    place, mask = saved(family, folder)
    return VllmEngine(
        str(place),
        mask,
        served_model_name="tiny",
        dtype="float32",
        max_num_seqs=16,
        max_model_len=128,
        arguments=VllmArguments(others=["enforce_eager=true"]),
    )


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in FOREIGN])
def test_a_mixed_batch_has_the_tokens_of_plain_transformers(family: str, tmp_path: Path) -> None:
    thresholds = (ZERO, Threshold(12, 9), Threshold(6, 3), Threshold(3, 0))
    engine = engine_of(family, tmp_path)

    async def answer(prompt: tuple[int, ...], threshold: Threshold) -> Answer:
        request = GenerateRequest(prompt, threshold, GREEDY, LENGTH, num_logprobs=0)
        outputs = await collect(engine.generate(request))
        scores = [place.chosen.logprob for output in outputs for place in output.logprobs or ()]
        return tokens(outputs), [score for score in scores if score is not None]

    async def answers() -> list[Answer]:
        try:
            asked = [answer(prompt, threshold) for prompt in PROMPTS for threshold in thresholds]
            return list(await asyncio.gather(*asked))
        finally:
            await engine.close()

    found = asyncio.run(answers())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    mask = Mask.load(tmp_path / "mask.safetensors")
    for prompt in PROMPTS:
        first = []
        for threshold in thresholds:
            with modulated(model, mask, threshold):
                expected, scores = plain(model, prompt)
            answered, scored = found.pop(0)
            assert answered == expected
            assert scored == pytest.approx(scores, abs=1e-4)
            first.append(scores[0])
        assert min(abs(one - other) for one, other in itertools.combinations(first, 2)) > 3e-4, first


def plain(model: Any, prompt: tuple[int, ...]) -> Answer:
    """The greedy tokens, and the logarithms of their probabilities."""
    row = torch.tensor([prompt])
    whole = model.generate(
        row, attention_mask=torch.ones_like(row), max_new_tokens=LENGTH, do_sample=False,
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    answered = whole.sequences[0, len(prompt) :].tolist()
    logits = torch.cat(whole.logits)
    return tuple(answered), logits.log_softmax(-1)[range(len(answered)), answered].tolist()


@pytest.mark.parametrize("family", FOREIGN)
def test_a_family_that_vllm_runs_through_transformers_modules_is_refused(family: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=f"{family} through transformers' own modules"):
        engine_of(family, tmp_path)
