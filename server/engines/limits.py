"""What a request may ask of any model: tokens that fit the context, tokens and adapters that exist.

Knows numbers and names. Knows no model and no engine.
"""

from collections.abc import Collection

from server.engines.base import PromptError, PromptTooLongError, Sampling, UnsupportedByEngineError


def token_limit(max_model_len: int, num_prompt_tokens: int, max_tokens: int | None) -> int:
    """The most tokens that an answer may have. Raises PromptTooLongError."""
    room = max_model_len - num_prompt_tokens
    if room < 1:
        raise PromptTooLongError(
            f"The prompt is {num_prompt_tokens} tokens long; with at least one token of answer it "
            f"must fit the context of {max_model_len}. Shorten the messages."
        )
    if max_tokens is not None and max_tokens > room:
        raise PromptTooLongError(
            f"The prompt's {num_prompt_tokens} tokens and max_tokens {max_tokens} together exceed "
            f"the context of {max_model_len}. Lower max_tokens to {room} or less, or "
            "leave it out."
        )
    return room if max_tokens is None else max_tokens


def refuse_unknown_bias(sampling: Sampling, vocabulary: int) -> None:
    """Raises PromptError for a bias on a number that is no token."""
    for token, _ in sampling.logit_bias:
        if token >= vocabulary:
            raise PromptError(
                f"logit_bias: {token} is no token of this model; accepted: 0 to {vocabulary - 1}.",
                "logit_bias",
            )


def refuse_unknown_adapter(adapter: str | None, known: Collection[str]) -> None:
    """Raises UnsupportedByEngineError for an adapter that the engine does not have."""
    if adapter is not None and adapter not in known:
        raise UnsupportedByEngineError(
            f"There is no adapter {adapter!r} here. Accepted: {', '.join(known) or 'none'}.", "model"
        )
