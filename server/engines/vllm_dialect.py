"""Requests and answers in vLLM's words.

Knows `SamplingParams` and `RequestOutput`. Knows nothing of levels, nor of any running engine.
"""

import time
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any, Final

from transformers import PreTrainedTokenizerFast
from vllm import SamplingParams
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

from server.engines.base import GenerateRequest, Grammar, Sampling, TokenLogprob
from server.engines.grammar import Grammars, styled
from server.engines.limits import refuse_unknown_bias

_GREEDY_BELOW: Final = 1e-5


class Dialect:
    """Of a model with this tokenizer, so many tokens, and these that end an answer."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, vocabulary: int, ends: Collection[int]) -> None:
        self._vocabulary = vocabulary
        self._ends = sorted(ends)
        self._grammars = Grammars(tokenizer, vocabulary, ends)

    def sampling(self, request: GenerateRequest, limit: int) -> SamplingParams:
        """How a request's tokens, at most `limit`, are drawn. Raises what keeps it from being asked of
        vLLM."""
        refuse_unknown_bias(request.sampling, self._vocabulary)
        if request.grammar is not None:
            self._grammars.matcher(request.grammar)  # refuses what cannot be followed
        sampling = request.sampling
        if sampling.temperature < _GREEDY_BELOW:
            sampling = replace(sampling, temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, seed=None)
        return SamplingParams(
            max_tokens=max(1, limit),
            **_drawing(sampling),
            stop_token_ids=self._ends,
            ignore_eos=True,  # the ends are those above
            logprobs=request.num_logprobs,
            prompt_logprobs=request.num_prompt_logprobs,
            structured_outputs=_structured(request.grammar) if request.grammar is not None else None,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
            skip_clone=True,
        )

    def known(self, request: GenerateRequest, step: RequestOutput, limit: int) -> dict[str, Any]:
        """What a step of vLLM's tells beside tokens, as an `Output` has it."""
        known: dict[str, Any] = {"num_cached_tokens": step.num_cached_tokens or 0}
        answer = step.outputs[0]
        if request.num_logprobs is not None and limit:
            assert answer.logprobs is not None
            known["logprobs"] = tuple(
                self._place(token, place, request.num_logprobs)
                for token, place in zip(answer.token_ids, answer.logprobs, strict=True)
            )
        if request.num_prompt_logprobs is not None and step.prompt_logprobs:
            tokens = step.prompt_token_ids
            assert tokens is not None
            first = TokenLogprob(self._grammars.candidate(tokens[0], None), ())
            pairs = zip(tokens[1:], step.prompt_logprobs[1:], strict=True)
            known["prompt_logprobs"] = (
                first,
                *(self._place(token, place or {}, request.num_prompt_logprobs) for token, place in pairs),
            )
        return known

    def _place(self, token: int, place: Mapping[int, Any], num_top: int) -> TokenLogprob:
        """A place of vLLM's log-probabilities: the token that stands there and the likeliest, by rank."""
        ranked = sorted(place.items(), key=lambda item: (item[1].rank, item[0]))[:num_top]
        top = tuple(self._grammars.candidate(each, found.logprob) for each, found in ranked)
        return TokenLogprob(self._grammars.candidate(token, place[token].logprob), top)


def queued_seconds(step: RequestOutput, begun: float) -> float:
    """From `begun` until the request's first step. vLLM's clock is this one's where its scheduler runs on
    this machine; where it does not, or says nothing, until its first token."""
    passed = time.monotonic() - begun
    scheduled = getattr(step.metrics, "scheduled_ts", 0.0) - begun
    return scheduled if 0 < scheduled < passed else passed


def _drawing(sampling: Sampling) -> dict[str, Any]:
    """How tokens are drawn, in vLLM's names. A seed is whatever 64 bits it has; vLLM takes -1 for none."""
    return {
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p,
        "seed": None if sampling.seed is None else sampling.seed & (1 << 64) - 1,
        "repetition_penalty": sampling.repetition_penalty,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "logit_bias": dict(sampling.logit_bias) or None,
    }


def _structured(grammar: Grammar) -> StructuredOutputsParams:
    if grammar.kind == "json_schema":
        return StructuredOutputsParams(json=styled(grammar.text))
    return StructuredOutputsParams(grammar=grammar.text)
