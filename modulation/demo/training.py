"""The demo model's recipe: stage one learns to help with everything, stage two to refuse harm.

Knows tensors, the corpus and the tokenizer; knows nothing of attribution, masks or evaluation.
Seeded: the same seed gives the same model, up to the rounding of the machine's arithmetic.
"""

import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from modulation.demo.corpus import STAGE_ONE, STAGE_TWO, Dialogue, Mix, dialogues
from modulation.demo.vocabulary import (
    IGNORED_LABEL,
    MAX_POSITIONS,
    encode_dialogue,
    train_tokenizer,
)

TOKENIZER_SEED = 1_000_003
TOKENIZER_DIALOGUES = 20_000
SORTING_WINDOW = 40

OnStep = Callable[[str, int, int, float], None]
"""Told after each step: the stage's name, the step's number from 1, the steps in all, the loss."""


@dataclass(frozen=True)
class Stage:
    """One pass over freshly drawn dialogues with a linearly warmed and cooled learning rate."""

    name: str
    mix: Mix
    num_steps: int
    batch_size: int
    learning_rate: float
    warmup_steps: int
    final_share: float


@dataclass(frozen=True)
class Recipe:
    """Both stages and the optimiser's settings; `betas` and `weight_decay` are AdamW's."""

    stages: tuple[Stage, ...] = (
        Stage("stage one: help", STAGE_ONE, 520, 64, 3e-3, 50, 0.05),
        Stage("stage two: refuse", STAGE_TWO, 170, 64, 8e-4, 10, 0.02),
    )
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.05
    max_gradient_norm: float = 1.0


def new_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """A Llama of 3.4 million random float32 parameters: 6 layers of 640 neurons each."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=640,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def train(seed: int, recipe: Recipe, on_step: OnStep) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Run the recipe on CPU; returns the model (float32, in evaluation mode) and its tokenizer."""
    tokenizer = train_tokenizer(dialogues(TOKENIZER_SEED, TOKENIZER_DIALOGUES, STAGE_ONE))
    model = new_model(tokenizer, seed)
    for number, stage in enumerate(recipe.stages):
        run_stage(model, tokenizer, stage, recipe, seed * len(recipe.stages) + number, on_step)
    model.train(False)
    return model, tokenizer


def run_stage(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    stage: Stage,
    recipe: Recipe,
    seed: int,
    on_step: OnStep,
) -> None:
    """Train the model in place on dialogues drawn with the seed."""
    model.train()
    optimizer = _optimizer(model, stage, recipe)
    drawn = dialogues(seed, stage.num_steps * stage.batch_size, stage.mix)
    batches = _batches(drawn, tokenizer, stage.batch_size, seed)
    for step, (input_ids, labels) in enumerate(batches, start=1):
        for group in optimizer.param_groups:
            group["lr"] = stage.learning_rate * _rate_share(step, stage)
        logits = model(input_ids=input_ids, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1),
            labels[:, 1:].flatten(),
            ignore_index=IGNORED_LABEL,
        )
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.max_gradient_norm)
        optimizer.step()
        optimizer.zero_grad()
        on_step(stage.name, step, stage.num_steps, loss.item())


def _optimizer(model: LlamaForCausalLM, stage: Stage, recipe: Recipe) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    return torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": recipe.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=stage.learning_rate,
        betas=recipe.betas,
        fused=True,
    )


def _rate_share(step: int, stage: Stage) -> float:
    """Share of the peak learning rate: linear up over the warm-up, then linear down."""
    if step <= stage.warmup_steps:
        return step / stage.warmup_steps
    cooled = (step - stage.warmup_steps) / max(1, stage.num_steps - stage.warmup_steps)
    return 1.0 - (1.0 - stage.final_share) * cooled


def _batches(
    drawn: list[Dialogue], tokenizer: PreTrainedTokenizerFast, batch_size: int, seed: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Right-padded input ids and labels, both (batch, tokens); like lengths share a batch.

    Causal attention needs no mask here: padding stands after every token that is learned.
    """
    order = torch.Generator().manual_seed(seed)
    window = batch_size * SORTING_WINDOW
    for start in range(0, len(drawn), window):
        encoded = [encode_dialogue(tokenizer, d) for d in drawn[start : start + window]]
        encoded.sort(key=lambda pair: len(pair[0]))
        starts = torch.arange(0, len(encoded), batch_size)
        for first in starts[torch.randperm(len(starts), generator=order)].tolist():
            rows = encoded[first : first + batch_size]
            yield (
                _padded([ids for ids, _ in rows], int(tokenizer.pad_token_id)),
                _padded([labels for _, labels in rows], IGNORED_LABEL),
            )


def _padded(rows: list[list[int]], value: int) -> torch.Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [value] * (width - len(row)) for row in rows])


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a Hugging Face folder in bfloat16; the folder appears whole or not at all.

    Files of an earlier model are replaced; other files of the folder (a model card) stay.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".demo-") as scratch:
        fresh, stale = Path(scratch) / "fresh", Path(scratch) / "stale"
        if folder.exists():
            shutil.copytree(folder, fresh)
        stored = LlamaForCausalLM(model.config)
        stored.load_state_dict(model.state_dict())
        torch.nn.Module.to(stored, dtype=torch.bfloat16)
        stored.generation_config.do_sample = False
        stored.generation_config.max_new_tokens = None
        stored.save_pretrained(fresh)
        tokenizer.save_pretrained(fresh)
        if folder.exists():
            folder.rename(stale)
        fresh.rename(folder)
