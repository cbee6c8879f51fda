"""Per-request sampling in one batch of mixed requests, and the thresholds that travel with it.

Knows transformers' continuous-batching logits processors. Knows nothing of neurons or of requests
beyond their arguments. What a request's own row needs besides is done by `server/engines/rows.py`.

Each step, the manager hands this list every request of the step in batch order. It writes one column
of arguments per request into static storage, which the model's forward receives as
`logits_processor_args`, int32 (rows, requests): first the threshold rows, one column per request of
the step; then the sampling rows, one column per request that gets a new token.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessor,
    ContinuousBatchingLogitsProcessorList,
    ContinuousBatchingTemperatureLogitsWarper,
    ContinuousBatchingTopKLogitsWarper,
    ContinuousBatchingTopPLogitsWarper,
)
from transformers.generation.continuous_batching.requests import FutureRequestState
from transformers.generation.logits_process import (
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from server.engines.base import Sampling
from server.engines.rows import Row
from server.engines.tallying import Tally

NUM_THRESHOLD_ROWS: Final = 2


@dataclass(frozen=True, slots=True)
class RowArguments:
    """What one request brings to every step, in the form that the processors read.

    `temperature` is 1.0 for a greedy request, whose `noise` is 0.0; `top_k` is the size of the
    vocabulary where nothing is to be cut; `seed` is 64 bits, unsigned. `row` is what else it needs. `mask`
    is what it runs under; nothing here looks into it.
    """

    num_safety: int
    num_utility: int
    temperature: float
    noise: float
    top_k: int
    top_p: float
    seed: int
    row: Row
    mask: Any = None

    def as_keywords(self) -> dict[str, Any]:
        """The `logit_processor_kwargs` of the manager's `add_request`."""
        return {name: getattr(self, name) for name in self.__slots__}


def _keywords(request: FutureRequestState) -> Mapping[str, Any]:
    return request.state.logit_processor_kwargs or _warm_up()


def _warm_up() -> dict[str, Any]:
    """What the manager's own warm-up requests bring, which know nothing of arguments: greedy, at `off`."""
    return RowArguments(
        num_safety=0,
        num_utility=0,
        temperature=1.0,
        noise=0.0,
        top_k=1,
        top_p=1.0,
        seed=0,
        row=Row((), Sampling()),
    ).as_keywords()


class SeededNoise:
    """Gumbel noise for each request, so that the manager's argmax draws a sample.

    argmax(logits + Gumbel noise) is a draw from softmax(logits) (Gumbel 1954; Maddison et al. 2014,
    "A* sampling"). The noise of a request is a function of its seed, the position of the new token
    and the token id alone, so neither its neighbours nor its place in the batch change its answer.
    """

    ROWS: Final = 4  # noise scale, seed low, seed high, position

    def arguments(self, requests: Sequence[FutureRequestState]) -> Tensor:
        """int32 (ROWS, requests); the scale is a float32 seen as int32."""
        keywords = [_keywords(request) for request in requests]
        scale = torch.tensor([each["noise"] for each in keywords], dtype=torch.float32)
        words = [
            [_signed(int(each["seed"]) & 0xFFFFFFFF) for each in keywords],
            [_signed(int(each["seed"]) >> 32) for each in keywords],
            # Counted from the start of the prompt: stays right when an evicted request starts over.
            [request.state.position_offset for request in requests],
        ]
        return torch.cat([scale.view(torch.int32)[None], torch.tensor(words, dtype=torch.int32)])

    def __call__(self, scores: Tensor, arguments: Tensor) -> Tensor:
        """`scores` (requests, vocabulary) plus noise; a row of scale 0 comes back as it was."""
        arguments = arguments[:, : scores.shape[0]]
        scale = arguments[0].view(torch.float32)[:, None]
        low, high, position = (row[:, None] for row in arguments[1:])
        tokens = torch.arange(scores.shape[1], dtype=torch.int32, device=scores.device)[None]
        bits = _mix(_mix(_mix(_mix(tokens + low) ^ high) + position) ^ tokens)
        gumbel = -torch.log(-torch.log(_uniform(bits)))
        # Not scores + 0 * noise: a score of -inf or a huge one must stay what it is.
        return torch.where(scale > 0, scores + gumbel, scores)


def _mix(bits: Tensor) -> Tensor:
    """Scramble int32 words: the finaliser of MurmurHash3 (Appleby, public domain), wrapping."""
    bits = (bits ^ ((bits >> 16) & 0xFFFF)) * -2048144789
    bits = (bits ^ ((bits >> 13) & 0x7FFFF)) * -1028477387
    return bits ^ ((bits >> 16) & 0xFFFF)


def _uniform(bits: Tensor) -> Tensor:
    """int32 words to float32 in (0, 1), both ends excluded.

    23 bits and a half: one bit more, and the largest word would round to 1, whose noise is infinite
    and would draw a token that top-k has cut.
    """
    return ((bits >> 9) & 0x7FFFFF).to(torch.float32).add_(0.5).mul_(2.0**-23)


def _signed(word: int) -> int:
    """A 32-bit word as the int32 of the same bits."""
    return word - (1 << 32) if word >= 1 << 31 else word


class RequestProcessors(ContinuousBatchingLogitsProcessorList):
    """The manager's list of processors: temperature, top-k, top-p and seeded noise, per request.

    A processor that no request of the step needs is skipped, since sorting a large vocabulary costs more than
    a decoding step. `most` is how many requests a step may have; what is computed here is on `device`.
    """

    def __init__(self, vocabulary: int, most: int, device: torch.device | str = "cpu") -> None:
        super().__init__(LogitsProcessorList())
        self._warpers: list[ContinuousBatchingLogitsProcessor] = [
            ContinuousBatchingTemperatureLogitsWarper(TemperatureLogitsWarper(1.0)),
            ContinuousBatchingTopKLogitsWarper(TopKLogitsWarper(top_k=vocabulary)),
            ContinuousBatchingTopPLogitsWarper(TopPLogitsWarper(top_p=1.0)),
        ]
        self._vocabulary = vocabulary
        self._noise = SeededNoise()
        self._needed = [True] * (len(self._warpers) + 1)
        self.step: list[FutureRequestState] = []
        self._drawing: list[FutureRequestState] = []
        # Of the step that runs: whose prompt is scored, from which place on, at which of the step's tokens.
        self.scored: list[tuple[Row, int, range]] = []
        self._special: list[tuple[int, Row]] = []
        # Written to in place, since a CUDA graph writes where it wrote when it was recorded.
        self._peaks = torch.zeros(most, device=device)
        self._tally: Tally | None = None
        self._looks_up_prefixes = False
        self.tensors_required = NUM_THRESHOLD_ROWS + len(self._warpers) + SeededNoise.ROWS
        self.supported_keys = dict.fromkeys(RowArguments.__slots__, float)
        self.do_processing = True

    def count_in(self, tally: Tally, *, looks_up_prefixes: bool) -> None:
        """From now on `tally` is told of every step, and of every prompt that begins and is looked up."""
        self._tally, self._looks_up_prefixes = tally, looks_up_prefixes

    def check_kwargs(self, kwargs: dict[str, Any]) -> None:
        """Nothing to refuse: requests reach the manager only as `RowArguments`."""
        assert kwargs.keys() == self.supported_keys.keys(), (kwargs, self.supported_keys)

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        """Arguments of a padding column: nothing active, nothing cut, no noise. int32 (rows, 1)."""
        int32_tensor.zero_()
        for row, warper in enumerate(self._warpers, start=NUM_THRESHOLD_ROWS):
            warper.fill_defaults(int32_tensor[row])

    def prepare_tensor_args(self, requests_in_batch: list[FutureRequestState], arg_storage: Tensor) -> Tensor:
        """Write this step's columns into `arg_storage`, int32 (rows, columns)."""
        thresholds = [(each["num_safety"], each["num_utility"]) for each in map(_keywords, requests_in_batch)]
        arg_storage[:NUM_THRESHOLD_ROWS, : len(thresholds)] = torch.tensor(thresholds, dtype=torch.int32).T
        drawing = [request for request in requests_in_batch if request.has_new_token]
        self.step, self._drawing = requests_in_batch, drawing
        if self._tally is not None:
            self._tally.step_begins(len(set(thresholds)))
        self.scored = []
        first = 0
        for request in requests_in_batch:
            row, begin = row_of(request), request.state.position_offset - request.query_length
            if row.num_cached is None:
                self._note_first_step(row, begin)
            if row.num_prompt_logprobs is not None:
                count = min(request.query_length, len(row.prompt) - 1 - begin)
                if count > 0:
                    self.scored.append((row, begin + 1, range(first, first + count)))
            first += request.query_length
        self._special = [(place, row) for place, row in enumerate(map(row_of, drawing)) if not row.is_plain]
        sampled = [each for each in map(_keywords, drawing) if each["noise"] > 0]
        self._needed = [
            any(each["temperature"] != 1.0 for each in sampled),
            any(each["top_k"] < self._vocabulary for each in sampled),
            any(each["top_p"] < 1.0 for each in sampled),
            bool(sampled),
        ]
        if self._needed[-1]:
            for number, warper in enumerate(self._warpers, start=NUM_THRESHOLD_ROWS):
                arg_storage[number, : len(drawing)] = warper.prepare_tensor_args(drawing)
            arg_storage[-SeededNoise.ROWS :, : len(drawing)] = self._noise.arguments(drawing)
        return arg_storage

    def _note_first_step(self, row: Row, num_cached: int) -> None:
        row.num_cached, row.begun = num_cached, time.perf_counter()
        if self._tally is not None and self._looks_up_prefixes and row.num_prompt_logprobs is None:
            self._tally.looked_up(len(row.prompt), num_cached)

    def __call__(
        self,
        input_ids: Tensor,  # noqa: ARG002 - the manager passes it; none of ours reads it
        scores: Tensor,
        logits_processor_args: Tensor,
    ) -> Tensor:
        """`scores` (requests, vocabulary), of which the manager then takes the argmax."""
        rows = logits_processor_args[NUM_THRESHOLD_ROWS:]
        self._peaks[: len(scores)].copy_(scores.amax(dim=-1))
        scores = self._by_row(scores, Row.before_temperature)
        for number, (needed, warper) in enumerate(zip(self._needed, self._warpers, strict=False)):
            if needed:
                scores = warper(scores, rows[number])
            if number == 0:
                scores = self._by_row(scores, Row.after_temperature)
        if self._needed[-1]:
            scores = self._noise(scores, rows[len(self._warpers) :])
        return scores

    def end_step(self, tokens: Tensor) -> list[FutureRequestState]:
        """Tell the rows the tokens drawn, int (requests with a new token,); the requests that got none.

        A request gets none if its logits are no distribution. Their maximum shows it: it is NaN or infinity
        if one of them is (minus infinity, a token that cannot come, only if all are). It is asked for here
        and not in the step, when all of that has been computed: nothing has to wait for it.
        """
        sound = self._peaks[: len(self._drawing)].isfinite().tolist()
        for place, row in self._special:
            if sound[place]:
                row.chosen(int(tokens[place]))
        return [each for each, is_sound in zip(self._drawing, sound, strict=True) if not is_sound]

    @property
    def running(self) -> Sequence[bool]:
        """Which processors run in this step."""
        return self._needed

    @property
    def is_alike(self) -> bool:
        """Whether another step with the same processors and the same mask differs from this one in its
        tensors alone: nothing is done in Python between them."""
        return not self._special and not self.scored and not self.is_timed

    @property
    def is_timed(self) -> bool:
        """Whether modulation is to be timed in this step."""
        return self._tally is not None and self._tally.is_sampled

    @property
    def only_mask(self) -> Any:
        """The mask that all requests of this step run under; None: there are several, or a warm-up."""
        masks = self.masks()
        return masks[0] if all(each is masks[0] for each in masks) else None

    def masks(self) -> list[Any]:
        """Under which mask each request of this step runs."""
        return [_keywords(request)["mask"] for request in self.step]

    def _by_row(self, scores: Tensor, change: Callable[[Row, Tensor], Tensor]) -> Tensor:
        if not self._special:
            return scores
        scores = scores.clone()
        for place, row in self._special:
            scores[place] = change(row, scores[place])
        return scores


def row_of(request: FutureRequestState) -> Row:
    """What a request of the step needs of its own row."""
    found: Row = _keywords(request)["row"]
    return found
