"""transformers' batching manager with a level for every request: sampling, and a cache per level.

Knows the manager's paged cache and how it names blocks. Knows nothing of masks; a threshold arrives
as two numbers in the request id, which survives everything the scheduler does to a request.

The KV cache belongs to a level: a prefix computed under one threshold is wrong under another, so
prefixes are shared within a threshold and never across.
"""

from collections.abc import Callable, Iterable
from typing import Any, SupportsIndex, overload

from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel
from transformers.generation.continuous_batching import (
    ContinuousBatchingManager,
    PagedAttentionCache,
    RequestState,
    RequestStatus,
)
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchProcessor

from modulation.levels import Threshold
from server.engines.sampling import RequestProcessors


def request_id(name: str, threshold: Threshold) -> str:
    """The id under which the manager knows a request: its name and its threshold."""
    return f"{name}|{threshold.num_safety}|{threshold.num_utility}"


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
    """A paged cache whose blocks are found again only by requests at the same threshold."""

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
        salt = [int(number) for number in request_id.rsplit("|", 2)[1:]]
        return _SaltedTokens(tokens, salt, page_size)


class LevelManager(ContinuousBatchingManager):
    """A continuous-batching manager that samples per request and keeps a cache per level.

    `on_end` is called on the manager's thread when its loop has ended, whatever ended it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        generation: GenerationConfig,
        batching: ContinuousBatchingConfig,
        on_end: Callable[[], None],
    ) -> None:
        super().__init__(model, generation, batching)  # type: ignore[arg-type]
        self.logit_processor = RequestProcessors(
            model.config.get_text_config().vocab_size,
            static=any(self.continuous_batching_config.cuda_graph_booleans),
        )
        self._on_end = on_end

    def _create_batch_processor(self) -> ContinuousBatchProcessor:
        processor = super()._create_batch_processor()
        # The base class names its cache class itself; ours adds no state, so an instance can turn.
        assert type(processor.cache) in (PagedAttentionCache, LevelCache), type(processor.cache)
        processor.cache.__class__ = LevelCache
        return processor

    def _run_generation_loop(self) -> None:
        try:
            super()._run_generation_loop()
        finally:
            self._on_end()
