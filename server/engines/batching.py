"""transformers' batching manager with a level for every request: sampling, attention, and a cache per level.

Knows the manager's paged cache and how it names blocks. Knows nothing of masks but a number; it, the
threshold's two and four for the client's salt arrive in the request id, which survives everything the
scheduler does to a request. One more number there belongs to a request that must compute its whole prompt
itself, and is its alone.

The KV cache belongs to a level of a mask: a prefix computed under one threshold is wrong under another, so
prefixes are shared within a threshold, a mask and a salt, and never across.
"""

import gc
import hashlib
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, SupportsIndex, overload

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel
from transformers.generation.continuous_batching import (
    ContinuousBatchingManager,
    FIFOScheduler,
    PagedAttentionCache,
    RequestState,
    RequestStatus,
)
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchProcessor, OutputRouter
from transformers.generation.continuous_batching.input_outputs import ContinuousBatchingIOs
from transformers.generation.continuous_batching.requests import FutureRequestState, GenerationOutput

from modulation.errors import ModelError
from modulation.levels import Threshold
from server.engines import attention, varlen
from server.engines.attention import NAME as BY_REQUEST
from server.engines.attention import PlannedIOs, can_attend_by_request
from server.engines.compiled import NAME as COMPILED
from server.engines.compiled import Attend, CompiledForward
from server.engines.cuda import CudaRunner
from server.engines.sampling import RequestProcessors, row_of
from server.engines.taking_back import SuspectScheduler, release, take_back
from server.engines.tallying import Tally
from server.engines.threads import StepThreads
from server.engines.varlen import NAME as VARLEN
from server.engines.varlen import can_attend_varlen

_ATTENDS: Final[dict[str, Attend]] = {BY_REQUEST: attention.attend, VARLEN: varlen.attend}


def request_id(
    number: int, threshold: Threshold, mask: int, cache_salt: str = "", *, shares_prefixes: bool = True
) -> str:
    """The id under which the manager knows a request: its number, its threshold, its mask's number, its
    salt as numbers, and whose prefixes it may share: those that have all of these, or nobody's."""
    # Four numbers of 31 bits, since that is what the manager makes the names of blocks of.
    digest = int.from_bytes(hashlib.sha256(cache_salt.encode()).digest()) if cache_salt else 0
    salt = "|".join(str(digest >> shift & (1 << 31) - 1) for shift in (0, 31, 62, 93))
    shared = f"request-{number}|{threshold.num_safety}|{threshold.num_utility}|{mask}|{salt}"
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
    """A paged cache whose blocks are found again only by requests at the same threshold of the same mask
    with the same salt.

    Those of `suspects` neither find nor leave any: what is cached may be what is wrong.
    """

    suspects: set[str]

    def search_prefix_match(self, request_id: str, prompt_ids: list[int]) -> int:
        """As the base class does, among the blocks of this request's threshold."""
        if request_id in self.suspects:
            return 0
        return super().search_prefix_match(request_id, self._salted(request_id, prompt_ids))

    def mark_complete_blocks(self, state: RequestState, complete_blocks: dict[str, int]) -> None:
        """As the base class does, under names that carry this request's threshold."""
        finished = state.status == RequestStatus.FINISHED  # its blocks are gone already
        suspect = state.request_id in self.suspects
        if not self.use_prefix_sharing or not complete_blocks or finished or suspect:
            return
        tokens = self._salted(state.request_id, [*state.initial_tokens, *state.generated_tokens])
        for name, count in complete_blocks.items():
            self.cache_allocators[name].mark_complete_blocks(state.request_id, tokens, count)

    @property
    def usage(self) -> float:
        """The share of the cache that requests hold, 0 to 1. Blocks that are only kept to be found again
        count as free. May be read on any thread: nothing is iterated over."""
        kept = sum(
            len(each.ledger.cached_blocks) * each.bytes_per_block for each in self.cache_allocators.values()
        )
        free = self.compute_free_capacity() + kept / (self.num_sectors * self.bytes_per_sector)
        return min(1.0, max(0.0, 1.0 - free))  # the counts may be of two moments

    def _salted(self, request_id: str, tokens: list[int]) -> list[int]:
        # Prefixes are shared only where every layer attends to everything, and there all pages agree.
        (page_size,) = {each.tokens_per_page for each in self.cache_allocators.values()}
        salt = [int(number) for number in request_id.split("|")[1:]]
        return _SaltedTokens(tokens, salt, page_size)


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


def is_out_of_memory(error: Exception) -> bool:
    """Whether what could not be had is memory: PyTorch says so on CUDA by a type, on CPU in words."""
    words = ("not enough memory", "can't allocate memory", "CUDA error: out of memory")
    short = isinstance(error, RuntimeError) and any(each in str(error) for each in words)
    return short or isinstance(error, torch.OutOfMemoryError | MemoryError)


class LevelManager(ContinuousBatchingManager):
    """A continuous-batching manager that samples per request and keeps a cache per level.

    A request whose logits are NaN or infinite, or that does not fit into memory, fails alone: its row says
    why. Steps run on `num_threads` cores, and through `compiled` where the model is. `on_lost_step` is called
    on the manager's thread when a step was given up before its end, and `on_end` with the manager, also
    there, when its loop has ended, whatever ended it.

    Raises:
        ModelError: the model is compiled, and its attention is not one that a compiled pass can call.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        generation: GenerationConfig,
        batching: ContinuousBatchingConfig,
        num_threads: int,
        on_lost_step: Callable[[], None],
        on_end: Callable[["LevelManager"], None],
        compiled: CompiledForward | None = None,
    ) -> None:
        self._compiled = compiled
        super().__init__(model, generation, batching)  # type: ignore[arg-type]
        most = self.continuous_batching_config.max_requests_per_batch
        assert most is not None
        self.processors = RequestProcessors(model.config.get_text_config().vocab_size, most, model.device)
        self.logit_processor = self.processors
        self._threads = StepThreads(num_threads, model.num_parameters())
        self._on_lost_step = on_lost_step
        self._on_end = on_end
        self.is_discarded = False
        self._cleared: list[str] = []

    def switch_to_cb_friendly_attn(self, model: Any, auto_switch_to_flash: bool = True) -> None:
        """As the base class does, and then to attention by request where the model can have it."""
        if model.config._attn_implementation in (BY_REQUEST, VARLEN, COMPILED):  # by a manager that never ran
            model.set_attn_implementation("sdpa")
        super().switch_to_cb_friendly_attn(model, auto_switch_to_flash)
        ours = BY_REQUEST if can_attend_by_request(model) else VARLEN if can_attend_varlen(model) else None
        self._attends = ours
        if ours is None and self._compiled is not None:
            raise ModelError(
                f"The model {type(model).__name__} cannot be compiled: its layers do not all attend to "
                "everything before them, or not by a function that this knows. Leave --compile out."
            )
        if ours is None:
            return
        self._original_attn_impl = model.config._attn_implementation
        model.set_attn_implementation(COMPILED if self._compiled else ours)
        if self._compiled:
            self._compiled.attend = _ATTENDS[ours]

    def _create_batch_processor(self) -> ContinuousBatchProcessor:
        processor = super()._create_batch_processor()
        # The base class names its cache class itself; ours adds no state, so an instance can turn.
        assert type(processor.cache) in (PagedAttentionCache, LevelCache), type(processor.cache)
        processor.cache.__class__ = LevelCache
        assert type(processor.scheduler) in (FIFOScheduler, SuspectScheduler), type(processor.scheduler)
        processor.scheduler.__class__ = SuspectScheduler
        if self._attends == BY_REQUEST:
            inputs = processor.inputs_and_outputs
            assert type(inputs) in (ContinuousBatchingIOs, PlannedIOs), type(inputs)
            inputs.__class__ = PlannedIOs
        if self.model.device.type == "cuda":
            CudaRunner.take_over(processor.model_runner, self.processors)
        cache, scheduler = processor.cache, processor.scheduler
        assert isinstance(cache, LevelCache) and isinstance(scheduler, SuspectScheduler)
        cache.suspects = scheduler.suspects = set()
        return processor

    def deliver_to_handlers_only(self) -> None:
        """From now on an output goes to its request's handler or nowhere; nothing is queued."""
        assert self.batch_processor is not None
        self.output_router = _Router(self.cancel_request)
        self.batch_processor.output_router = self.output_router

    def count_in(self, tally: Tally) -> None:
        """From now on `tally` counts steps and prompts."""
        self.processors.count_in(tally, looks_up_prefixes=self._cache.use_prefix_sharing)

    @property
    def kv_cache_usage(self) -> float:
        """The share of the KV cache that requests hold, 0 to 1. May be read on any thread."""
        processor = self.batch_processor  # another thread takes it away
        if processor is None:
            return 0.0
        assert isinstance(processor.cache, LevelCache), type(processor.cache)
        return processor.cache.usage

    @property
    def pads_steps(self) -> bool:
        """Whether steps have tokens that belong to no request, as CUDA graphs need."""
        assert self.batch_processor is not None
        return bool(self.batch_processor.model_runner.pad_inputs)

    @property
    def more_tokens_than_rows(self) -> int:
        """A step of so many tokens of one request has fewer rows of logits, also where both are padded."""
        assert self.batch_processor is not None
        config = self.batch_processor.model_runner.cb_config
        assert config.max_requests_per_batch is not None
        return int(config.max_requests_per_batch + config.q_padding_interval_size + 1)

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
        runner = self._cuda_runner  # `stop` gives the processor up
        if self._generation_thread is not None:
            self.stop(block=True, hard_stop=True)
        if runner is not None:
            runner.forget_graphs()
        self.batch_processor = None
        error = self.background_thread_status.fatal_error
        if error is not None:
            error.__traceback__ = None  # its frames hold the tensors of the step that failed

    def _generation_loop_body(self, batch_processor: ContinuousBatchProcessor, bootstrapping: bool) -> bool:
        try:
            goes_on = super()._generation_loop_body(batch_processor, bootstrapping)
            self._scheduler.suspects.difference_update(self._cleared)
            self._cleared = []
            return goes_on
        except Exception as error:
            lost = [each for each in self.processors.step if self._is_active(each)]
            if not is_out_of_memory(error) or not lost:
                raise
            cause = str(error).partition("\n")[0]
        # Out here the error is gone, and with it its frames, which held the step's tensors.
        logging.getLogger(__name__).error(
            "A step of %d requests ran out of memory (%s); each is tried alone.", len(lost), cause
        )
        self._on_lost_step()
        self._take_back(lost, f"there is not enough memory for it, even alone ({cause})")
        runner = self._cuda_runner
        if runner is not None:
            runner.forget_graphs()
        gc.collect()
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()
        return True

    def _generation_step(self) -> None:
        if self.model.device.type == "cpu" and self._compiled is None:  # it is compiled for so many threads
            self._threads.use(self._outputs.num_request_in_batch, self._outputs.num_q_tokens)
        super()._generation_step()
        broken = self.processors.end_step(self._outputs.output_ids[0])
        sound = [each for each in self.processors.step if each.has_new_token and each not in broken]
        self._cleared = [each.state.request_id for each in sound]
        if broken:
            logging.getLogger(__name__).warning(
                "NaN or infinity in the logits of %d of a step's %d requests; each is tried alone.",
                len(broken),
                len(self.processors.step),
            )
            self._drop(broken)
            self._take_back(broken, "the model computed NaN or infinity for its next token")

    @property
    def _outputs(self) -> ContinuousBatchingIOs:
        assert self.batch_processor is not None
        found = self.batch_processor.inputs_and_outputs
        assert isinstance(found, ContinuousBatchingIOs), type(found)
        return found

    @property
    def _cuda_runner(self) -> CudaRunner | None:
        runner = self.batch_processor.model_runner if self.batch_processor is not None else None
        return runner if isinstance(runner, CudaRunner) else None

    @property
    def _scheduler(self) -> SuspectScheduler:
        assert self.batch_processor is not None
        found = self.batch_processor.scheduler
        assert isinstance(found, SuspectScheduler), type(found)
        return found

    @property
    def _cache(self) -> LevelCache:
        assert self.batch_processor is not None
        found = self.batch_processor.cache
        assert isinstance(found, LevelCache), type(found)
        return found

    def _is_active(self, request: FutureRequestState) -> bool:
        return self._scheduler.active_requests.get(request.state.request_id) is request.state

    def _drop(self, broken: Sequence[FutureRequestState]) -> None:
        """Take requests out of the step that has just run, before their states learn of its tokens."""
        outputs, drawing = self._outputs, [each for each in self.processors.step if each.has_new_token]
        kept = [place for place, each in enumerate(drawing) if each not in broken]
        outputs.output_ids[0, : len(kept)] = outputs.output_ids[0, kept]
        outputs.requests_in_batch = [each for each in outputs.requests_in_batch if each not in broken]

    def _take_back(self, requests: Sequence[FutureRequestState], reason: str) -> None:
        """Fail the request if it was alone in its step; else find out who is at fault."""
        cache, scheduler = self._cache, self._scheduler
        if len(self.processors.step) > 1:
            take_back(requests, scheduler, cache)
            return
        for each in requests:
            row_of(each).error = reason
            release(each.state, scheduler, cache)
            self.output_router.fail_and_deliver(each.state, RuntimeError(reason))

    def _run_generation_loop(self) -> None:
        self._threads.begin()
        try:
            super()._run_generation_loop()
        finally:
            self._on_end(self)
