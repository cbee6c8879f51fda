"""What one request asks of its own row of logits beyond temperature and cuts: grammar, bias, penalties,
log-probabilities.

Knows logits and tokens. Knows nothing of the batching manager or of how tokens are drawn. A row lives from
a request's first step to its last; it is written to by the manager's thread alone, and only grows, so that
another thread may read what is there.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol, Self

import torch
from torch import Tensor
from transformers.generation.logits_process import MinPLogitsWarper, RepetitionPenaltyLogitsProcessor

from server.engines.base import Sampling


@dataclass(frozen=True, slots=True)
class PlaceLogprobs:
    """Log-probabilities at one place: of the token that stands there, and of the likeliest ones."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class Matcher(Protocol):
    """A grammar and how much of it the tokens so far have filled. Raises ValueError where it cannot go on."""

    def restrict(self, scores: Tensor) -> None:
        """Set to -inf the scores, float32 (vocabulary,), of the tokens that cannot come next, in place."""
        ...

    def accept(self, token_id: int) -> None:
        """Take note of the token that came."""
        ...


@dataclass
class Row:
    """`prompt` are the request's tokens. `num_cached`, `begun` (when its first step began, of
    `time.perf_counter`), `logprobs`, `prompt_logprobs` (by place) and `error` are what became known."""

    prompt: Sequence[int]
    sampling: Sampling
    matcher: Matcher | None = None
    num_logprobs: int | None = None
    num_prompt_logprobs: int | None = None
    num_cached: int | None = None
    begun: float | None = None
    logprobs: list[PlaceLogprobs] = field(default_factory=list)
    prompt_logprobs: dict[int, PlaceLogprobs] = field(default_factory=dict)
    error: str | None = None
    _answer: list[int] = field(default_factory=list)
    _raw: Tensor | None = None
    _bias: tuple[Tensor, Tensor] | None = None

    def __deepcopy__(self, _memo: dict[int, Any]) -> Self:
        return self  # an evicted request starts over as another object, and goes on with this row

    @cached_property
    def is_plain(self) -> bool:
        """Whether temperature, cuts and noise are all that this row needs."""
        sampling = self.sampling
        return (
            self.matcher is None
            and self.num_logprobs is None
            and not sampling.logit_bias
            and sampling.repetition_penalty == 1
            and not (sampling.min_p or sampling.presence_penalty or sampling.frequency_penalty)
        )

    def before_temperature(self, scores: Tensor) -> Tensor:
        """`scores`, float32 (vocabulary,), biased, penalised and restricted."""
        if self.num_logprobs is not None:
            self._raw = scores.log_softmax(dim=-1)
        scores = scores.clone()
        sampling = self.sampling
        if sampling.logit_bias:
            if self._bias is None:
                biased, values = zip(*sampling.logit_bias, strict=True)
                self._bias = (
                    torch.tensor(biased, device=scores.device),
                    torch.tensor(values, dtype=scores.dtype, device=scores.device),
                )
            scores.index_add_(0, *self._bias)
        if sampling.repetition_penalty != 1:
            seen = torch.tensor([[*self.prompt, *self._answer]], device=scores.device)
            penalise = RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)
            scores = penalise(seen, scores[None])[0]
        if self._answer and (sampling.presence_penalty or sampling.frequency_penalty):
            times = Counter(self._answer)
            tokens = torch.tensor(list(times), device=scores.device)
            counts = torch.tensor(list(times.values()), dtype=scores.dtype, device=scores.device)
            scores[tokens] -= sampling.presence_penalty + sampling.frequency_penalty * counts
        if self.matcher is not None:  # last: what may not come may not come whatever else is asked for
            try:
                self.matcher.restrict(scores)
            except ValueError as error:
                self.error = str(error)
        return scores

    def after_temperature(self, scores: Tensor) -> Tensor:
        """`scores`, float32 (vocabulary,), without tokens that `min_p` cuts."""
        if not self.sampling.min_p:
            return scores
        keep = MinPLogitsWarper(self.sampling.min_p)
        cut: Tensor = keep(torch.empty(1, 0), scores[None])[0]  # type: ignore[arg-type]
        return cut

    def chosen(self, token_id: int) -> None:
        """Take note of the token drawn."""
        self._answer.append(token_id)
        if self._raw is not None:
            assert self.num_logprobs is not None
            self.logprobs.append(place_logprobs(self._raw, token_id, self.num_logprobs))
        if self.matcher is not None and self.error is None:
            try:
                self.matcher.accept(token_id)
            except ValueError as error:
                self.error = str(error)

    def saw_prompt(self, begin: int, logits: Tensor) -> None:
        """Note the logits, float32 (places, vocabulary), of the prompt's tokens from place `begin` on."""
        assert self.num_prompt_logprobs is not None
        if not logits.amax(dim=-1).isfinite().all():
            self.error = "the model computed NaN or infinity in its prompt"
        tokens = self.prompt[begin : begin + len(logits)]
        found = zip(
            tokens, *_likeliest(logits.log_softmax(dim=-1), tokens, self.num_prompt_logprobs), strict=True
        )
        for place, each in enumerate(found, start=begin):
            self.prompt_logprobs[place] = PlaceLogprobs(*each)


def _likeliest(
    logprobs: Tensor, tokens: Sequence[int], number: int
) -> tuple[list[float], list[tuple[tuple[int, float], ...]]]:
    """Of distributions, float32 (places, vocabulary): each one's token's, and the `number` likeliest."""
    chosen = logprobs.gather(1, torch.tensor(tokens, device=logprobs.device)[:, None])[:, 0].tolist()
    top = logprobs.topk(min(number, logprobs.shape[1]), dim=1)
    pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return chosen, [tuple(zip(*each, strict=True)) for each in pairs]


def place_logprobs(logprobs: Tensor, token_id: int, number: int) -> PlaceLogprobs:
    """Of a distribution, float32 (vocabulary,): the token's and the `number` likeliest ones'."""
    [chosen], [top] = _likeliest(logprobs[None], [token_id], number)
    return PlaceLogprobs(token_id, chosen, top)
