"""What an engine needs to know of a model beside its weights: sizes, and where answers end.

Knows model configurations and tokenizers. Knows nothing of requests.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from modulation.errors import ModelError
from modulation.loading import Resolved

# KV-cache tokens where none are asked for: enough for tens of chats, small enough for small machines.
_DEFAULT_CACHE_TOKENS: Final = {"cpu": 16_384, "cuda": 65_536}


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
