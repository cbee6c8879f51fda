"""The noise that draws samples: its distribution, and its ends."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers.generation.continuous_batching.requests import FutureRequestState, RequestState

from server.engines.base import Sampling
from server.engines.rows import Row
from server.engines.sampling import NUM_THRESHOLD_ROWS, RequestProcessors, RowArguments, _uniform
from server.engines.tallying import Tally

VOCABULARY = 16


def step(arguments: list[RowArguments], scores: torch.Tensor, position: int = 5) -> list[int]:
    """One step of the manager: the token drawn for each request. scores: (vocabulary,)."""
    processors = RequestProcessors(VOCABULARY, len(arguments))
    requests = []
    for number, each in enumerate(arguments):
        state = RequestState(f"{number}|0|0", [1], logit_processor_kwargs=each.as_keywords())
        state.position_offset = position
        requests.append(FutureRequestState(state, has_new_token=True, complete_blocks={}, query_length=1))
    storage = torch.zeros(processors.tensors_required, len(arguments) + 3, dtype=torch.int32)
    processors.prepare_tensor_args(requests, storage)
    tokens = torch.zeros(len(arguments), dtype=torch.int64)
    return processors(tokens, scores.repeat(len(arguments), 1), storage).argmax(-1).tolist()


def sampled(seed: int, **fields: float) -> RowArguments:
    defaults = {"temperature": 1.0, "top_k": VOCABULARY, "top_p": 1.0}
    return RowArguments(0, 0, noise=1.0, seed=seed, row=Row((1,), Sampling()), **{**defaults, **fields})  # type: ignore[arg-type]


def test_no_word_gives_infinite_noise() -> None:
    """The largest word once rounded to 1.0, whose noise is infinite: it drew tokens that top-k had cut."""
    words = torch.tensor([-1, 0, 1, 2**31 - 1, -(2**31), -256, 255], dtype=torch.int32)
    uniform = _uniform(words)
    assert ((uniform > 0) & (uniform < 1)).all()
    assert (-torch.log(-torch.log(uniform))).isfinite().all()


@pytest.mark.parametrize("vary", ["seed", "high word", "position"])
def test_draws_follow_the_softmax(vary: str) -> None:
    """Pearson's chi-square against the exact probabilities, 15 degrees of freedom, 1 in 100,000."""
    scores = torch.linspace(-2, 2, VOCABULARY)
    number = 6000
    if vary == "position":
        drawn = [step([sampled(7)], scores, position)[0] for position in range(1000)]
    else:
        shift = 32 if vary == "high word" else 0
        drawn = step([sampled(seed << shift) for seed in range(number)], scores)
    weights = np.exp(scores.numpy().astype(np.float64))
    expected = len(drawn) * weights / weights.sum()
    counts = np.bincount(drawn, minlength=VOCABULARY)
    assert ((counts - expected) ** 2 / expected).sum() < 52.0


def test_top_k_top_p_and_temperature_cut_what_they_should() -> None:
    scores = torch.linspace(0, 15, VOCABULARY)
    seeds = range(500)
    assert set(step([sampled(seed, top_k=1) for seed in seeds], scores)) == {15}
    assert set(step([sampled(seed, top_k=3, temperature=5.0) for seed in seeds], scores)) == {13, 14, 15}
    assert set(step([sampled(seed, top_p=0.5) for seed in seeds], scores)) == {15}
    assert len(set(step([sampled(seed, temperature=50.0) for seed in seeds], scores))) == VOCABULARY


def test_a_request_of_the_managers_own_warm_up_is_greedy_and_off() -> None:
    processors = RequestProcessors(VOCABULARY, most=4)
    state = RequestState("warm-up", [1])
    request = FutureRequestState(state, has_new_token=True, complete_blocks={}, query_length=1)
    storage = torch.full((processors.tensors_required, 4), 9, dtype=torch.int32)
    processors.prepare_tensor_args([request], storage)
    assert storage[:NUM_THRESHOLD_ROWS, 0].tolist() == [0, 0]
    scores = torch.linspace(-3, 3, VOCABULARY)[None]
    assert processors(torch.zeros(1), scores, storage).argmax(-1).tolist() == [15]


def test_steps_are_alike_if_nothing_of_them_is_done_in_python() -> None:
    """What a CUDA graph may replay: see `server.engines.cuda`."""
    processors = RequestProcessors(VOCABULARY, most=4)
    storage = torch.zeros(processors.tensors_required, 4, dtype=torch.int32)

    def prepared(*rows: RowArguments) -> RequestProcessors:
        states = [RequestState("0|0|0", [1, 2], logit_processor_kwargs=each.as_keywords()) for each in rows]
        for state in states:
            state.position_offset = 2
        requests = [FutureRequestState(state, True, {}, query_length=2) for state in states]
        processors.prepare_tensor_args(requests, storage)
        return processors

    plain = replace(sampled(1), mask="one")
    assert prepared(plain, plain).is_alike and processors.only_mask == "one"
    assert prepared(plain, replace(plain, mask="other")).only_mask is None
    assert prepared(replace(plain, mask=None)).only_mask is None
    for special in (
        Row((1,), Sampling(frequency_penalty=1.0)),
        Row((1,), Sampling(), num_logprobs=1),
        Row((1, 2), Sampling(), num_prompt_logprobs=1),
    ):
        assert not prepared(plain, replace(plain, row=special)).is_alike
    tally = Tally(sample_every=3)
    processors.count_in(tally, looks_up_prefixes=False)
    assert [prepared(plain).is_alike for _ in range(6)] == [True, True, False, True, True, False]
    assert prepared(plain).running == [False, False, False, True]
    assert prepared(replace(plain, top_p=0.5, temperature=2.0)).running == [True, False, True, True]


def test_what_was_infinite_is_known_of_each_step_anew() -> None:
    """The place that a graph writes to stays the same."""
    processors = RequestProcessors(VOCABULARY, most=3)
    place = processors._peaks.data_ptr()
    for value, sound in ((0.0, True), (torch.nan, False), (torch.inf, False), (1.0, True)):
        state = RequestState("0|0|0", [1], logit_processor_kwargs=sampled(1).as_keywords())
        request = FutureRequestState(state, has_new_token=True, complete_blocks={}, query_length=1)
        storage = torch.zeros(processors.tensors_required, 3, dtype=torch.int32)
        processors.prepare_tensor_args([request], storage)
        scores = torch.zeros(1, VOCABULARY)
        scores[0, 3] = value
        tokens = processors(torch.zeros(1), scores, storage).argmax(-1)
        assert processors.end_step(tokens) == ([] if sound else [request])
        assert processors._peaks.data_ptr() == place
