"""Exports made by the command, and what a model says: greedy tokens and logits."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from typer.testing import CliRunner, Result

from modulation.demo import MODEL_DIR
from modulation.demo.splits import learning_records
from modulation.loading import load_model, load_tokenizer
from server.cli import app
from tests.tiny_models import random_mask, save_mask, tiny_model

TOLERANCE = 1e-4
LEVELS = ("security-critical", "balanced", "utility-priority")
NUM_PROMPTS = 16


def run(*arguments: str | Path) -> Result:
    """`neurontune export` with these arguments."""
    return CliRunner().invoke(app, ["export", *map(str, arguments)])


def exported(*arguments: str | Path) -> str:
    """What a successful export prints."""
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(*arguments: str | Path) -> str:
    """The one sentence, or few, of an export that is refused."""
    result = run(*arguments)
    assert result.exit_code == 1 and result.stdout == "", result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("neurontune: ")]
    assert len(lines) == 1 and "Traceback" not in result.stderr, result.stderr
    return lines[0]


def demo_model() -> PreTrainedModel:
    return load_model(str(MODEL_DIR), device="cpu", dtype="float32")


def demo_prompts() -> list[list[int]]:
    """Prompts as the demo model's chat template writes them: half of them attacks, which levels answer
    differently."""
    tokenizer, some = load_tokenizer(str(MODEL_DIR)), random.Random(3)
    known = learning_records(seed=0)
    attacks = [each for each in known if each.family is not None]
    records = some.sample(attacks, NUM_PROMPTS // 2) + some.sample(known, NUM_PROMPTS // 2)
    rendered = (
        tokenizer.apply_chat_template(
            [{"role": "user", "content": record.prompt}], add_generation_prompt=True, tokenize=False
        )
        for record in records
    )
    return [list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in rendered]


def greedy(model: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int = 32) -> list[list[int]]:
    """The tokens of each answer."""
    answers = []
    for prompt in prompts:
        ids = torch.tensor([list(prompt)])
        with torch.no_grad():
            found = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=0,
            )
        answers.append(found[0, len(prompt) :].tolist())
    return answers


def logits(model: Any, prompts: Sequence[Sequence[int]]) -> list[Tensor]:
    """The logits (tokens, vocabulary) of each prompt."""
    with torch.no_grad():
        return [model(input_ids=torch.tensor([list(prompt)])).logits[0] for prompt in prompts]


def assert_close(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=TOLERANCE)


def tiny_folder(folder: Path, family: str) -> tuple[Path, Path]:
    """A tiny random model with a tokenizer, and a mask for it."""
    from tests.tiny_models import byte_tokenizer

    tokenizer = byte_tokenizer()
    model = tiny_model(
        family, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, bos_token_id=None
    )
    model.save_pretrained(folder / family)
    tokenizer.save_pretrained(folder / family)
    return folder / family, save_mask(random_mask(model), folder, f"{family}.safetensors")


def random_prompts(number: int = 3) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(6, 262, (7 + each,), generator=generator).tolist() for each in range(number)]
