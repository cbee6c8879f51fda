"""The noise that draws samples: its distribution, and its ends."""

import numpy as np
import pytest
import torch
from transformers.generation.continuous_batching.requests import FutureRequestState, RequestState

from server.engines.base import Sampling
from server.engines.rows import Row
from server.engines.sampling import NUM_THRESHOLD_ROWS, RequestProcessors, RowArguments, _uniform

VOCABULARY = 16


def step(arguments: list[RowArguments], scores: torch.Tensor, position: int = 5) -> list[int]:
    """One step of the manager: the token drawn for each request. scores: (vocabulary,)."""
    processors = RequestProcessors(VOCABULARY, static=False)
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
    processors = RequestProcessors(VOCABULARY, static=True)
    state = RequestState("warm-up", [1])
    request = FutureRequestState(state, has_new_token=True, complete_blocks={}, query_length=1)
    storage = torch.full((processors.tensors_required, 4), 9, dtype=torch.int32)
    processors.prepare_tensor_args([request], storage)
    assert storage[:NUM_THRESHOLD_ROWS, 0].tolist() == [0, 0]
    scores = torch.linspace(-3, 3, VOCABULARY)[None]
    assert processors(torch.zeros(1), scores, storage).argmax(-1).tolist() == [15]
