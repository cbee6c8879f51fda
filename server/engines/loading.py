"""Load a model, its tokenizer and its mask, and decide device, dtype and sizes, each with a reason.

Knows files and hardware. Knows nothing of requests.
"""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from modulation.errors import ModelError

_DTYPES: Final = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
# KV-cache tokens where none are asked for: enough for tens of chats, small enough for small machines.
_DEFAULT_CACHE_TOKENS: Final = {"cpu": 16_384, "cuda": 65_536}


@dataclass(frozen=True, slots=True)
class Resolved:
    """A setting's value and why it has it, as `value (reason)` in text."""

    value: str
    reason: str

    def __str__(self) -> str:
        return f"{self.value} ({self.reason})"


def resolve_device(device: str) -> Resolved:
    """`cpu` or `cuda`. Raises ModelError for a device that is not there."""
    has_cuda = torch.cuda.is_available()
    if device == "auto":
        if has_cuda:
            return Resolved("cuda", f"auto: {torch.cuda.get_device_name()}")
        return Resolved("cpu", "auto: no CUDA device")
    if device == "cuda" and not has_cuda:
        raise ModelError("Device 'cuda' was asked for, but torch sees no CUDA device. Use 'cpu' or 'auto'.")
    return Resolved(device, "as asked")


def resolve_dtype(dtype: str, device: str) -> Resolved:
    """`float32`, `bfloat16` or `float16`."""
    if dtype == "auto":
        return Resolved("bfloat16" if device == "cuda" else "float32", f"auto: {device}")
    return Resolved(dtype, "as asked")


def load_tokenizer(model: str) -> PreTrainedTokenizerFast:
    """The model's tokenizer. Raises ModelError where there is none, or none with a chat template."""
    _refuse_missing_folder(model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    except Exception as error:
        raise ModelError(
            f"Model {model!r} has no usable tokenizer ({_first_line(error)}). Its folder needs "
            "tokenizer.json and tokenizer_config.json."
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast) or tokenizer.vocab_size < 1:
        raise ModelError(
            f"Model {model!r} has no usable tokenizer: its folder needs tokenizer.json and "
            "tokenizer_config.json."
        )
    if tokenizer.chat_template is None:
        raise ModelError(
            f"The tokenizer of model {model!r} has no chat template, so it cannot serve chats: use "
            "an instruction-tuned model, or put a chat_template.jinja into its folder."
        )
    return tokenizer


def load_model(model: str, *, device: str, dtype: str) -> PreTrainedModel:
    """The model in evaluation mode on `device`. Raises ModelError."""
    _refuse_missing_folder(model)
    try:
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=_DTYPES[dtype])
    except Exception as error:
        raise ModelError(f"Model {model!r} cannot be loaded: {_first_line(error)}") from error
    assert isinstance(loaded, PreTrainedModel), type(loaded)
    loaded.to(device)  # type: ignore[arg-type]
    loaded.train(False)
    return loaded


def stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> Collection[int]:
    """The tokens that end an answer: those of the generation config, and the tokenizer's own."""
    configured = model.generation_config.eos_token_id if model.generation_config else None
    ids = {configured} if isinstance(configured, int) else set(configured or ())
    if tokenizer.eos_token_id is not None:
        ids.add(tokenizer.eos_token_id)
    return ids


def generation_config(ids: Collection[int]) -> GenerationConfig:
    """Greedy as far as the manager is concerned: draws are made by our own last processor."""
    return GenerationConfig(do_sample=False, eos_token_id=sorted(ids) or -1)  # type: ignore[no-untyped-call]


@dataclass(frozen=True, slots=True)
class Sizes:
    """Tokens of context per request, and pages of `page_size` tokens in the KV cache."""

    max_model_len: Resolved
    num_pages: int
    page_size: int

    @property
    def cache_tokens(self) -> int:
        """Tokens that the KV cache holds."""
        return self.num_pages * self.page_size


def resolve_sizes(
    model: PreTrainedModel,
    *,
    device: str,
    max_model_len: int | None,
    kv_cache_tokens: int | None,
    page_size: int,
) -> Sizes:
    """How long a conversation may be and how many of them fit.

    Raises:
        ModelError: a context longer than the model's, or than the KV cache.
    """
    longest = int(getattr(model.config.get_text_config(), "max_position_embeddings", 2048))
    if max_model_len is not None and max_model_len > longest:
        raise ModelError(
            f"max_model_len {max_model_len} is more than the model's context of {longest} tokens."
        )
    tokens = kv_cache_tokens or max(_DEFAULT_CACHE_TOKENS[device], max_model_len or 0)
    num_pages = -(-tokens // page_size)
    # One page is kept free, so that the scheduler can always move a request of full length.
    room = (num_pages - 1) * page_size
    if kv_cache_tokens is None and max_model_len is not None and room < max_model_len:
        num_pages += 1
        room += page_size
    if room < (max_model_len or page_size):
        raise ModelError(
            f"A KV cache of {tokens} tokens cannot hold one request of {max_model_len or page_size}: "
            f"raise kv_cache_tokens to {(max_model_len or page_size) + page_size} or more, or lower "
            "max_model_len."
        )
    if max_model_len is not None:
        return Sizes(Resolved(str(max_model_len), "as asked"), num_pages, page_size)
    if longest <= room:
        return Sizes(Resolved(str(longest), "the model's context"), num_pages, page_size)
    reason = f"bounded by the KV cache; the model's context is {longest}"
    return Sizes(Resolved(str(room), reason), num_pages, page_size)


def _refuse_missing_folder(model: str) -> None:
    """A path that is not there reads to the hub client like a malformed name; say it plainly."""
    looks_like_path = model.startswith((".", "/", "~")) or model.count("/") > 1
    if looks_like_path and not Path(model).is_dir():
        raise ModelError(f"Model folder {model!r} does not exist.")


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
