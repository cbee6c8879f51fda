"""Models of random weights in the shapes of real ones, with masks: for speed and memory alone.

What they generate means nothing. The tokenizer is the demo model's.
"""

import shutil
from pathlib import Path
from typing import Final

import numpy as np
import torch
from transformers import AutoTokenizer, LlamaConfig, PreTrainedConfig, PreTrainedModel, Qwen3Config
from transformers.models.auto import AutoModelForCausalLM

from modulation.demo import MODEL_DIR
from modulation.levels import BALANCED, SECURITY_CRITICAL, UTILITY_PRIORITY, Threshold
from modulation.masks import Mask
from modulation.sites import find_sites
from modulation.tuning.drafting import draft

SHARE: Final = 0.02  # of all neurons, half of each kind
SHAPES: Final = ("smollm2-135m", "qwen3-0.6b", "llama-3-8b")


def config_of(shape: str) -> PreTrainedConfig:
    """The configuration of one of `SHAPES`."""
    match shape:
        case "smollm2-135m":
            return LlamaConfig(
                vocab_size=49152,
                hidden_size=576,
                intermediate_size=1536,
                num_hidden_layers=30,
                num_attention_heads=9,
                num_key_value_heads=3,
                max_position_embeddings=2048,
                tie_word_embeddings=True,
            )
        case "qwen3-0.6b":
            return Qwen3Config(
                vocab_size=151936,
                hidden_size=1024,
                intermediate_size=3072,
                num_hidden_layers=28,
                num_attention_heads=16,
                num_key_value_heads=8,
                head_dim=128,
                max_position_embeddings=8192,
                tie_word_embeddings=True,
            )
        case "llama-3-8b":
            return LlamaConfig(
                vocab_size=128256,
                hidden_size=4096,
                intermediate_size=14336,
                num_hidden_layers=32,
                num_attention_heads=32,
                num_key_value_heads=8,
                max_position_embeddings=8192,
            )
        case _:
            raise ValueError(f"There is no shape {shape!r}; there are {', '.join(SHAPES)}.")


def random_model(
    config: PreTrainedConfig, seed: int, *, dtype: torch.dtype = torch.bfloat16, device: str = "cpu"
) -> PreTrainedModel:
    """A model of that configuration, in evaluation mode."""
    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    assert isinstance(model, PreTrainedModel), type(model)
    model.train(False)
    return model


def random_mask(model: PreTrainedModel, seed: int) -> Mask:
    """A mask of `SHARE` of the model's neurons, drawn at random, with three levels."""
    sites = find_sites(model)
    width = sites[0].width
    number = int(SHARE * len(sites) * width / 2)
    chosen = np.random.default_rng(seed).choice(len(sites) * width, size=2 * number, replace=False)
    neurons = np.stack([chosen // width, chosen % width], axis=1).astype(np.int32)
    levels = {
        SECURITY_CRITICAL: Threshold(number, number),
        BALANCED: Threshold(number // 2, number // 2),
        UTILITY_PRIORITY: Threshold(number // 8, number),
    }
    return draft(model, "bench", neurons[:number], neurons[number:], factors=(1.5, 0.5), levels=levels)


def write(model: PreTrainedModel, mask: Mask, folder: Path) -> Path:
    """Both into `folder`, with the demo model's tokenizer; the mask's path."""
    model.save_pretrained(folder)
    for path in MODEL_DIR.glob("*"):
        if "token" in path.name or path.suffix == ".jinja":
            shutil.copy(path, folder)
    mask.save(folder / "mask.safetensors")
    return folder / "mask.safetensors"


def speaking(shape: str, seed: int) -> PreTrainedModel:
    """A model of the shape in float32, with the demo tokenizer's vocabulary, that says whole words for ever:
    each of its tokens can be counted in its text, and no answer ends before its limit."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    config = config_of(shape)
    config.vocab_size, config.tie_word_embeddings = len(tokenizer), False
    config.bos_token_id = config.pad_token_id = None
    config.eos_token_id = tokenizer.eos_token_id
    model = random_model(config, seed, dtype=torch.float32)
    words = [
        token
        for token in range(len(tokenizer))
        if (text := tokenizer.decode([token])).startswith(" ")
        and text[1:].isalpha()
        and tokenizer(text * 2, add_special_tokens=False)["input_ids"] == [token] * 2
    ]
    assert len(words) > 100, len(words)
    silent = torch.ones(len(tokenizer), dtype=torch.bool)
    silent[words] = False
    with torch.no_grad():
        model.get_output_embeddings().weight[silent] = 0  # among many words one has more than that
    return model
