"""Proof, before anything is served, that modulation is in force in every one of vLLM's ranks.

Knows vLLM's `AsyncLLM` and the trial table of `vllm_worker`. Knows no mask.

A trial table multiplies every neuron of the first n ranks by zero, n being a request's threshold. The same
prompt is read at every n in one batch, through the compiled model and all that serves requests later. Its
log-probabilities must change with every rank that is added, by more than they differ between equal requests,
and at 0 they must be those of the untouched model.
"""

import asyncio
import itertools
from collections.abc import Sequence
from typing import Any, Final

from vllm import SamplingParams
from vllm.inputs import tokens_input
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM

from modulation.errors import ModelError
from server.engines.vllm_worker import EXTRA_ARGS_KEY, IDENTITY

_SLOT: Final = 1
_MARGIN: Final = 4.0
_LEAST: Final = 1e-4
Scores = tuple[float, ...]


async def prove_in_force(llm: AsyncLLM, prompt: Sequence[int]) -> None:
    """Read `prompt` at every number of ranks. Slot 1 is used up by it.

    Raises:
        ModelError: a rank's modulation does not show.
    """
    parallel = llm.vllm_config.parallel_config
    await llm.collective_rpc("neurontune_put_trial", args=(_SLOT,))
    num_ranks = parallel.tensor_parallel_size * parallel.pipeline_parallel_size
    for replica in range(parallel.data_parallel_size):
        rows = [(0, IDENTITY), (num_ranks, IDENTITY), *((number, _SLOT) for number in range(num_ranks + 1))]
        scores = await asyncio.gather(
            *(_scores(llm, prompt, row, replica, parallel.data_parallel_size > 1) for row in rows)
        )
        check(scores[:3], scores[2:])


def check(untouched: Sequence[Scores], by_ranks: Sequence[Scores]) -> None:
    """`untouched` are of equal requests without modulation, `by_ranks` of 0, 1, 2, ... ranks modulated.

    Raises ModelError as `prove_in_force` does.
    """
    noise = max(_distance(untouched[0], each) for each in untouched[1:])
    least = _MARGIN * noise + _LEAST
    for rank, (before, after) in enumerate(itertools.pairwise(by_ranks)):
        distance = _distance(before, after)
        if not distance > least:  # also where it is not a number
            raise ModelError(
                f"Modulation is not in force on rank {rank} of vLLM: the trial changes log-probabilities by "
                f"{distance:.2g}, and equal requests differ by {noise:.2g}. Nothing is served unmodulated."
            )


def _distance(one: Scores, other: Scores) -> float:
    return max(abs(first - second) for first, second in zip(one, other, strict=True))


async def _scores(
    llm: AsyncLLM, prompt: Sequence[int], row: tuple[int, int], replica: int, has_replicas: bool
) -> Scores:
    """The log-probabilities of the prompt's tokens under the first so many ranks, in a slot."""
    number, slot = row
    sampling = SamplingParams(
        temperature=0.0,
        max_tokens=1,
        prompt_logprobs=0,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
        extra_args={EXTRA_ARGS_KEY: [number, 0, slot]},
    )
    asked = tokens_input(list(prompt), cache_salt=f"trial:{number}:{slot}")
    where: dict[str, Any] = {"data_parallel_rank": replica} if has_replicas else {}
    name = f"trial-{replica}-{number}-{slot}"
    found = [step async for step in llm.generate(asked, sampling, name, **where)][-1].prompt_logprobs
    assert found is not None
    places = zip(prompt[1:], found[1:], strict=True)
    return tuple(place[token].logprob for token, place in places if place is not None)
