"""Steps that are taken back: their requests are tried one by one, so that who is at fault fails alone.

Knows the manager's scheduler and cache. Knows nothing of why a step went wrong.

All requests of a step share its memory, and where attention is computed with a mask over the whole batch
one request's NaN reaches them all. So who is at fault shows only alone: a *suspect* computes everything anew,
in steps of its own, until it has a token.
"""

from collections.abc import Sequence
from typing import Any

from transformers.generation.continuous_batching import FIFOScheduler, PagedAttentionCache, RequestState
from transformers.generation.continuous_batching.requests import FutureRequestState


class SuspectScheduler(FIFOScheduler):
    """The manager's scheduler, which runs a suspect alone.

    It must also not wait for a request that has been cancelled: after an eviction it admits nothing new
    until an active request has finished; if the active ones are cancelled instead, that would never happen.
    """

    suspects: set[str]

    def clear_cancelled_requests(self) -> list[RequestState]:
        self.suspects -= self._requests_to_cancel
        cancelled = super().clear_cancelled_requests()
        if cancelled:
            self.block_new_requests = False
        return cancelled

    def _process_candidates(
        self, candidates: list[RequestState], *arguments: Any
    ) -> tuple[list[FutureRequestState], bool, bool, int, int]:
        suspects = [each for each in candidates if each.request_id in self.suspects]
        if not suspects:
            return super()._process_candidates(candidates, *arguments)
        alone = super()._process_candidates(suspects[:1], *arguments)
        others = [each for each in candidates if each.request_id not in self.suspects]
        # No room for it: the others go on, and make some.
        return alone if alone[0] or not others else super()._process_candidates(others, *arguments)


def take_back(
    requests: Sequence[FutureRequestState], scheduler: SuspectScheduler, cache: PagedAttentionCache
) -> None:
    """Have these requests computed anew, from what was known before their step; each is a suspect."""
    for each in requests:
        state = each.state
        release(state, scheduler, cache)
        scheduler.suspects.add(state.request_id)
        scheduler.add_waiting_request(state.create_equivalent_initial_request())


def release(state: RequestState, scheduler: SuspectScheduler, cache: PagedAttentionCache) -> None:
    """End a request in the scheduler. Nobody finds what it has cached: it may be what is wrong."""
    cache.free_blocks(state.request_id, no_cache=True)
    scheduler.finish_request(state.request_id)
    scheduler.suspects.discard(state.request_id)
    scheduler.block_new_requests = False  # it may have been the active one that others wait for
