"""Tiny random models of every supported family, and masks for them. Nothing is downloaded."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from modulation.fingerprints import fingerprint
from modulation.masks import Mask, MaskMetadata, NeuronSet
from modulation.sites import find_sites

VOCAB = 96
WIDTH = 48
LAYERS = 3

_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_OVERRIDES: dict[str, dict[str, object]] = {
    "falcon": {"ffn_hidden_size": WIDTH, "new_decoder_architecture": True, "num_kv_heads": 2},
    "gpt2": {"n_embd": 32, "n_inner": WIDTH, "n_layer": LAYERS, "n_head": 4, "n_positions": 512},
    "gpt_neox": {},
    "opt": {"ffn_dim": WIDTH, "word_embed_proj_dim": 32},
    "phi3": {"rope_scaling": None},
}
FAMILIES = (
    "falcon", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "granite", "llama", "mistral", "olmo2",
    "opt", "phi3", "qwen2", "qwen3", "stablelm",
)  # fmt: skip


def tiny_model(family: str = "llama", seed: int = 0, **overrides: object) -> PreTrainedModel:
    """A random model of `family` in float32, evaluation mode: 3 layers of 48 neurons, 96 tokens."""
    settings = {**_COMMON, **_OVERRIDES.get(family, {}), **overrides}
    if family in ("gpt2", "falcon", "opt", "gpt_neox"):
        settings = {key: value for key, value in settings.items() if key not in ("head_dim",)}
    if family in ("gpt2", "opt", "gpt_neox"):
        settings = {key: value for key, value in settings.items() if key != "num_key_value_heads"}
    config = AutoConfig.for_model(family, **settings)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    assert isinstance(model, PreTrainedModel)
    # Larger weights than the usual initialisation, so that modulating a neuron changes the output.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.2)
    return model


def random_mask(
    model: PreTrainedModel,
    seed: int = 0,
    num_safety: int = 12,
    num_utility: int = 9,
    model_id: str = "tiny",
) -> Mask:
    """A valid mask of random neurons with strong factors, spread over all layers of `model`."""
    sites = find_sites(model)
    width = sites[0].width
    generator = np.random.default_rng(seed)
    flat = generator.choice(len(sites) * width, size=num_safety + num_utility, replace=False)
    neurons = np.stack([flat // width, flat % width], axis=1).astype(np.int32)
    factors = generator.uniform(0.0, 6.0, size=len(flat)).astype(np.float32)
    return Mask(
        safety=NeuronSet(neurons[:num_safety].copy(), factors[:num_safety].copy()),
        utility=NeuronSet(neurons[num_safety:].copy(), factors[num_safety:].copy()),
        metadata=MaskMetadata(
            model_id=model_id,
            architecture=type(model).__name__,
            model_fingerprint=fingerprint(model),
            num_layers=len(sites),
            neurons_per_layer=width,
            levels={
                "security-critical": (num_safety, num_utility),
                "balanced": (num_safety // 2, num_utility // 3),
                "utility-priority": (1, num_utility),
            },
        ),
    )


def scaled(mask: Mask, by: float) -> Mask:
    """The same mask with other factors."""
    safety = NeuronSet(mask.safety.neurons, mask.safety.factors * np.float32(by))
    return replace(mask, safety=safety)


def save_mask(mask: Mask, folder: Path, name: str = "mask.safetensors") -> Path:
    """Write `mask` into `folder` and return its path."""
    path = folder / name
    mask.save(path)
    return path


CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte plus six special ones, with a chat template. 262 tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>"]
    vocabulary = {token: index for index, token in enumerate(specials + alphabet)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(specials)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        chat_template=CHAT_TEMPLATE,
    )


def tiny_chat_folder(folder: Path, family: str = "llama", seed: int = 0) -> Path:
    """A random model of `family` and its tokenizer as a Hugging Face folder."""
    tokenizer = byte_tokenizer()
    model = tiny_model(
        family, seed, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id,
        max_position_embeddings=2048, bos_token_id=None,
    )  # fmt: skip
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
