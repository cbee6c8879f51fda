"""transformers' batching manager with a level for every request: sampling, and a cache per level.

Knows the manager's paged cache and how it names blocks. Knows nothing of masks but a number; it and the
threshold's two arrive in the request id, which survives everything the scheduler does to a request. A fourth
number there belongs to a request that must compute its whole prompt itself, and is its alone.

The KV cache belongs to a level of a mask: a prefix computed under one threshold is wrong under another, so
prefixes are shared within a threshold and a mask, and never across.
"""

from collections.abc import Callable, Iterable
from typing import Any, SupportsIndex, overload

from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel
from transformers.generation.continuous_batching import (
    ContinuousBatchingManager,
    FIFOScheduler,
    PagedAttentionCache,
    RequestState,
    RequestStatus,
)
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchProcessor, OutputRouter
from transformers.generation.continuous_batching.requests import GenerationOutput

from modulation.levels import Threshold
from server.engines.sampling import RequestProcessors


def request_id(number: int, threshold: Threshold, mask: int, *, shares_prefixes: bool = True) -> str:
    """The id under which the manager knows a request: its number, its threshold, its mask's number, and
    whose prefixes it may share: those of its threshold under its mask, or nobody's."""
    shared = f"request-{number}|{threshold.num_safety}|{threshold.num_utility}|{mask}"
    return shared if shares_prefixes else f"{shared}|{number}"


class _SaltedTokens(list[int]):
    """Tokens of which every whole block reads as if it began with the salt.

    The cache names a block by the hash of its tokens and of its parent's name. It slices the tokens
    block by block; the salt joins each slice on its way into the hash.
    """

    def __init__(self, tokens: Iterable[int], salt: list[int], page_size: int) -> None:
        super().__init__(tokens)
        self._salt_ints = salt
        self._page_size = page_size

    @overload
    def __getitem__(self, index: SupportsIndex, /) -> int: ...
    @overload
    def __getitem__(self, index: slice, /) -> list[int]: ...
    def __getitem__(self, index: Any, /) -> Any:
        part = super().__getitem__(index)
        if isinstance(index, slice) and len(part) == self._page_size:
            return [*self._salt_ints, *part]
        return part


class LevelCache(PagedAttentionCache):
    """A paged cache whose blocks are found again only by requests at the same threshold of the same mask."""

    def search_prefix_match(self, request_id: str, prompt_ids: list[int]) -> int:
        """As the base class does, among the blocks of this request's threshold."""
        return super().search_prefix_match(request_id, self._salted(request_id, prompt_ids))

    def mark_complete_blocks(self, state: RequestState, complete_blocks: dict[str, int]) -> None:
        """As the base class does, under names that carry this request's threshold."""
        finished = state.status == RequestStatus.FINISHED  # its blocks are gone already
        if not self.use_prefix_sharing or not complete_blocks or finished:
            return
        tokens = self._salted(state.request_id, [*state.initial_tokens, *state.generated_tokens])
        for name, count in complete_blocks.items():
            self.cache_allocators[name].mark_complete_blocks(state.request_id, tokens, count)

    def _salted(self, request_id: str, tokens: list[int]) -> list[int]:
        # Prefixes are shared only where every layer attends to everything, and there all pages agree.
        (page_size,) = {each.tokens_per_page for each in self.cache_allocators.values()}
        salt = [int(number) for number in request_id.split("|")[1:]]
        return _SaltedTokens(tokens, salt, page_size)


class _Scheduler(FIFOScheduler):
    """The manager's scheduler, which must not wait for a request that has been cancelled.

    After an eviction it admits nothing new until an active request has finished. If the active ones
    are cancelled instead, that would never happen.
    """

    def clear_cancelled_requests(self) -> list[RequestState]:
        cancelled = super().clear_cancelled_requests()
        if cancelled:
            self.block_new_requests = False
        return cancelled


class _Router(OutputRouter):
    """Delivers outputs to the handlers of their requests, and keeps none that nobody waits for.

    An output without a handler belongs to a request that was aborted while a step was running, or
    whose cancel overtook it on the way in. Its cancel is sent again.
    """

    def __init__(self, cancel: Callable[[str], None]) -> None:
        super().__init__()
        self._cancel = cancel

    def deliver(self, output: GenerationOutput) -> None:
        self.deliver_batch([output])

    def deliver_batch(self, outputs: list[GenerationOutput]) -> None:
        with self._lock:
            handlers = [self.result_handlers.get(output.request_id) for output in outputs]
        wanted = []
        for handler, output in zip(handlers, outputs, strict=True):
            if handler is not None:
                wanted.append((*handler, output))
            elif not output.is_finished():
                self._cancel(output.request_id)
        if wanted:
            loop = wanted[0][1]  # one loop asks for everything, so one wake-up is enough
            loop.call_soon_threadsafe(_call_all, [(callback, output) for callback, _, output in wanted])


def _call_all(calls: Iterable[tuple[Callable[[GenerationOutput], None], GenerationOutput]]) -> None:
    for callback, output in calls:
        callback(output)


class LevelManager(ContinuousBatchingManager):
    """A continuous-batching manager that samples per request and keeps a cache per level.

    `on_end` is called with the manager, on its thread, when its loop has ended, whatever ended it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        generation: GenerationConfig,
        batching: ContinuousBatchingConfig,
        on_end: Callable[["LevelManager"], None],
    ) -> None:
        super().__init__(model, generation, batching)  # type: ignore[arg-type]
        self.processors = RequestProcessors(
            model.config.get_text_config().vocab_size,
            static=any(self.continuous_batching_config.cuda_graph_booleans),
        )
        self.logit_processor = self.processors
        self._on_end = on_end
        self.is_discarded = False

    def _create_batch_processor(self) -> ContinuousBatchProcessor:
        processor = super()._create_batch_processor()
        # The base class names its cache class itself; ours adds no state, so an instance can turn.
        assert type(processor.cache) in (PagedAttentionCache, LevelCache), type(processor.cache)
        processor.cache.__class__ = LevelCache
        assert type(processor.scheduler) in (FIFOScheduler, _Scheduler), type(processor.scheduler)
        processor.scheduler.__class__ = _Scheduler
        return processor

    def deliver_to_handlers_only(self) -> None:
        """From now on an output goes to its request's handler or nowhere; nothing is queued."""
        assert self.batch_processor is not None
        self.output_router = _Router(self.cancel_request)
        self.batch_processor.output_router = self.output_router

    @property
    def keeps_logits(self) -> bool:
        """Whether the model computes the logits of the tokens it is asked for alone."""
        assert self.batch_processor is not None
        runner = self.batch_processor.model_runner
        return bool(runner.supports_logits_to_keep(self.model))

    def forget(self, request_id: str) -> None:
        """End a request, wherever it is; nothing happens if it has ended already."""
        self.cancel_request(request_id)
        with self.output_router._lock:
            self.output_router.result_handlers.pop(request_id, None)

    @property
    def is_serving(self) -> bool:
        """Whether a request that is added now will be looked at."""
        return self.is_running() and self.background_thread_status.can_accept_new_requests() is None

    @property
    def why_ended(self) -> str:
        """What has ended the loop, in words."""
        error = self.background_thread_status.fatal_error
        return "its thread has ended" if error is None else " ".join(str(error).split()) or repr(error)

    def discard(self) -> None:
        """Stop, and give up what the loop or its end holds in memory."""
        self.is_discarded = True
        if self._generation_thread is not None:
            self.stop(block=True, hard_stop=True)
        self.batch_processor = None
        error = self.background_thread_status.fatal_error
        if error is not None:
            error.__traceback__ = None  # its frames hold the tensors of the step that failed

    def _run_generation_loop(self) -> None:
        try:
            super()._run_generation_loop()
        finally:
            self._on_end(self)
