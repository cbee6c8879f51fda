"""The embedded engine: transformers' continuous batching with modulation by forward hooks.

Knows the model, its mask and the batching manager. Knows nothing of HTTP or settings.

Each step, the manager packs the tokens of all running requests into one row. The arguments of each
request, its threshold among them, ride in static storage that the model's forward receives
(`sampling`); a pre-hook on the model expands thresholds to tokens (`steps`), and the modulators'
pre-hooks on the sites apply them (`masks`).
"""

import asyncio
import itertools
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import ExitStack, aclosing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch
from transformers import ContinuousBatchingConfig
from transformers.generation.continuous_batching.requests import GenerationOutput

from modulation.errors import ModelError
from modulation.fingerprints import fingerprint
from modulation.levels import ZERO, Threshold
from modulation.loading import load_model, load_tokenizer, resolve_device, resolve_dtype
from modulation.masks import Mask
from modulation.profiles import profile_of
from modulation.recorded import refuse_less_safe
from server.engines.base import (
    EngineHealth,
    EngineInfo,
    EngineUnavailableError,
    FinishReason,
    GenerateRequest,
    GenerationError,
    Output,
    Sampling,
    Tallies,
    TokenLogprob,
)
from server.engines.batching import LevelManager, request_id
from server.engines.compiled import CompiledForward
from server.engines.cuda import batching_arguments
from server.engines.grammar import Grammars
from server.engines.limits import refuse_unknown_adapter, refuse_unknown_bias, token_limit
from server.engines.masks import Masks, RequestMask
from server.engines.packing import pack_weights
from server.engines.preparing import Preparers, TokenizingEngine
from server.engines.rows import PlaceLogprobs, Row
from server.engines.sampling import RowArguments
from server.engines.sizes import generation_config, resolve_sizes, stop_ids
from server.engines.steps import hooked, passing_all_sites
from server.engines.supervision import DEFAULT_MAX_FAILURES, Supervisor, leave_it
from server.engines.tallying import SAMPLE_EVERY, SAMPLE_GRAPHED_EVERY, Tally
from server.engines.text import ChatText
from server.engines.threads import on_one_core
from server.engines.varlen import why_not_varlen

_PAGE_SIZE: Final = 32
# Dividing logits by less would overflow float32; sampling has long become greedy there.
_GREEDY_BELOW: Final = 1e-5
_PROBE_TIMEOUT_SECONDS: Final = 300.0
_COMPILE_TIMEOUT_SECONDS: Final = 1800.0
_MAX_STEP_TOKENS: Final = {"cpu": 512, "cuda": 2048}


def _told(why_not: str | None) -> str:
    return "true" if why_not is None else f"false ({why_not})"


@dataclass(frozen=True, slots=True)
class _Step:
    """What a step has brought to one request. The manager's own outputs hold all its tokens, each time anew:
    a client that does not read would keep a number of them that grows with the square of its answer."""

    tokens: tuple[int, ...]
    is_last: bool
    error: str | None


class _Arriving:
    """What the steps have brought to one request and nobody has taken yet, each token once."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[_Step | None] = asyncio.Queue()
        self._num_seen = 0

    def put(self, output: GenerationOutput) -> None:
        """Keep what is new in what the manager says."""
        tokens = tuple(output.generated_tokens[self._num_seen :])
        self._num_seen += len(tokens)
        self._queue.put_nowait(_Step(tokens, output.is_finished(), output.error))

    def end(self) -> None:
        """Nothing more will come."""
        self._queue.put_nowait(None)

    async def next(self) -> _Step | None:
        """The next one; None: nothing more will come."""
        return await self._queue.get()


class TransformersEngine(TokenizingEngine):
    """An `Engine` on transformers. Raises, from the constructor, what keeps it from being ready.

    A step that raises or a thread that dies ends all requests; manager and cache are then built anew on the
    same model. After `max_failures` in a row without a finished answer `on_fatal` is called, on any thread,
    and the engine stays as it is.

    Raises:
        ModelError: the model, its tokenizer or the sizes cannot be used.
        MaskError: the mask cannot be read, was made for another model, or has a level that is less safe than
            its name by its own record (unless `allow_less_safe_levels`).
    """

    def __init__(
        self,
        model: str,
        mask: Path,
        *,
        served_model_name: str,
        device: str = "auto",
        dtype: str = "auto",
        max_model_len: int | None = None,
        kv_cache_tokens: int | None = None,
        max_num_seqs: int = 64,
        prefix_caching: bool = True,
        cuda_graphs: bool = True,
        compile_model: bool = False,
        trust_remote_code: bool = False,
        allow_less_safe_levels: bool = False,
        max_failures: int = DEFAULT_MAX_FAILURES,
        on_fatal: Callable[[str], None] = leave_it,
    ) -> None:
        # What the manager says about its own choices at INFO is noise beside `describe`.
        logging.getLogger("ContinuousBatchingLogger").setLevel(logging.WARNING)
        tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
        loaded_mask = Mask.load(mask)
        self._allows_less_safe = allow_less_safe_levels
        self._refuse_less_safe(loaded_mask)
        on_device = resolve_device(device)
        in_dtype = resolve_dtype(dtype, on_device.value)
        self._model_name = model
        self._num_threads = torch.get_num_threads()
        with on_one_core():
            self._model = load_model(
                model, device=on_device.value, dtype=in_dtype.value, trust_remote_code=trust_remote_code
            )
        sizes = resolve_sizes(
            self._model,
            device=on_device.value,
            max_model_len=max_model_len,
            kv_cache_tokens=kv_cache_tokens,
            page_size=_PAGE_SIZE,
        )
        with on_one_core():
            of_weights = fingerprint(self._model)  # they do not stay where they are
            # torch's compiler does not take layers that are packed.
            self._compiled = CompiledForward(self._model) if compile_model else None
            if not compile_model:
                pack_weights(self._model)
            self._masks = Masks(self._model, loaded_mask, of_weights)
        ends = stop_ids(self._model, tokenizer)
        why_no_graphs = why_not_varlen(self._model) if cuda_graphs else "as asked"
        uses_graphs = why_no_graphs is None
        self._vocabulary = int(self._model.config.get_text_config().vocab_size)
        self._text = ChatText(tokenizer, ends, self._vocabulary, int(sizes.max_model_len.value))
        self._grammars = Grammars(tokenizer, self._vocabulary, ends)
        self._info = EngineInfo(
            model_id=served_model_name,
            max_model_len=int(sizes.max_model_len.value),
            levels=loaded_mask.levels,
            mask_digest=loaded_mask.digest,
            details={
                "engine": "transformers",
                "device": str(on_device),
                "dtype": str(in_dtype),
                "max_model_len": str(sizes.max_model_len),
                "kv_cache_tokens": str(sizes.cache_tokens),
                "prefix_caching": str(prefix_caching).lower(),
                **({"compiled": "true"} if compile_model else {}),
                **({"cuda_graphs": _told(why_no_graphs)} if on_device.value == "cuda" else {}),
            },
            mask=profile_of(loaded_mask),
        )
        # What is timed is not replayed from a graph, so it is timed less often where there are any.
        self._tally = Tally(SAMPLE_GRAPHED_EVERY if uses_graphs else SAMPLE_EVERY)
        self._numbers = itertools.count()
        self._preparers = Preparers(lambda prompt: self._text.encode(prompt), self._refuse_if_closed)
        self._open: dict[str, tuple[LevelManager, _Arriving]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._batching: dict[str, Any] = {
            "page_size": _PAGE_SIZE,
            "num_blocks": sizes.num_pages,
            "max_batch_tokens": max(_MAX_STEP_TOKENS[on_device.value], max_num_seqs),
            "max_requests_per_batch": max_num_seqs,
            "allow_block_sharing": prefix_caching,
            # Would switch itself on on some GPUs, and has not been tested with modulation.
            "auto_switch_to_flash": False,
            # Penalties and grammars need to know a step's token before the next one begins.
            "use_async_batching": False,
            **batching_arguments(uses_graphs=uses_graphs),
        }
        self._supervisor = Supervisor(
            self._start_manager,
            self._stop_manager,
            lambda: self._manager.is_serving,
            max_failures=max_failures,
            on_fatal=on_fatal,
        )
        with ExitStack() as stack:
            stack.enter_context(self._masks)
            stack.enter_context(hooked(self._model, self._masks, lambda: self._manager, self._tally))
            self._manager = self._new_manager()
            stack.callback(self._supervisor.close)
            self._supervisor.begin()
            self._hooks = stack.pop_all()

    def describe(self) -> EngineInfo:
        return self._info

    async def use_mask(self, mask: Mask) -> EngineInfo:
        self._refuse_less_safe(mask)
        await self._masks.use(mask)
        self._info = replace(self._info, levels=mask.levels, mask_digest=mask.digest, mask=profile_of(mask))
        return self._info

    def _refuse_less_safe(self, mask: Mask) -> None:
        if not self._allows_less_safe:
            refuse_less_safe(mask)

    def healthy(self) -> EngineHealth:
        reason = self._why_not_ready()
        if reason is not None:
            return EngineHealth(False, reason, 0, 0)
        manager = self._manager
        processor = manager.batch_processor
        scheduler = processor.scheduler if processor is not None else None
        return EngineHealth(
            ready=True,
            reason="",
            num_running=len(scheduler.active_requests) if scheduler else 0,
            num_waiting=(len(scheduler.waiting_requests) if scheduler else 0) + manager.input_queue.qsize(),
        )

    def tallies(self) -> Tallies:
        return self._tally.now(self._manager.kv_cache_usage, self._supervisor.num_restarts)

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Output, None]:
        asked = time.perf_counter()
        self._refuse_if_not_ready()
        refuse_unknown_adapter(request.adapter, self._info.adapters)
        with self._masks.held(request.mask_digest) as mask:
            prompt = await self._preparers.encoded(request.prompt)
            limit = token_limit(self._info.max_model_len, len(prompt), request.max_tokens)
            # Off the event loop, like tokenising: a large schema takes seconds to compile.
            row = await self._preparers.run(self._row, request, prompt) if request.grammar else None
            row = row or self._row(request, prompt)
            self._refuse_if_not_ready()
            shares = row.num_prompt_logprobs is None
            number, salt = next(self._numbers), request.cache_salt
            name = request_id(number, request.threshold, mask.number, salt, shares_prefixes=shares)
            arguments = self._arguments(request, row, mask.value)
            text, seen = self._text.stream(request.prompt), 0
            async with aclosing(self._steps(name, prompt, limit, arguments)) as steps:
                async for step in steps:
                    queued = (row.begun or asked) - asked
                    if not limit:
                        known = self._known(row, 0, 0)
                        yield Output("", (), "length", len(prompt), 0, queued_seconds=queued, **known)
                        return
                    known = self._known(row, seen, len(step.tokens))
                    seen += len(step.tokens)
                    finish = self._finish_reason(step)
                    if finish:
                        self._supervisor.succeeded()
                    yield Output(
                        text=text.push(step.tokens) + (text.finish() if finish else ""),
                        token_ids=step.tokens,
                        finish_reason=finish,
                        num_prompt_tokens=len(prompt),
                        num_completion_tokens=seen,
                        queued_seconds=queued,
                        **known,
                    )

    async def _steps(
        self, name: str, prompt: list[int], limit: int, arguments: RowArguments
    ) -> AsyncGenerator[_Step, None]:
        """What the manager says of a request after each of its steps, up to the last one.

        Raises:
            EngineUnavailableError: the manager has ended.
            GenerationError: the request cannot go on.
        """
        self._loop, manager = asyncio.get_running_loop(), self._manager
        steps = _Arriving()
        self._open[name] = manager, steps
        try:
            manager.register_result_handler(name, steps.put)
            added = manager.add_request(
                prompt,
                request_id=name,
                max_new_tokens=max(1, limit),
                streaming=True,
                **arguments.as_keywords(),
            )
            if added is None or not manager.is_running():
                raise self._unavailable()
            while True:
                step = await steps.next()
                if arguments.row.error is not None:
                    raise GenerationError(f"This answer could not go on: {arguments.row.error}.")
                if step is None or step.error is not None:
                    raise self._unavailable(step.error if step else manager.why_ended)
                yield step
                if step.is_last:
                    return
        finally:
            del self._open[name]
            manager.forget(name)

    def _row(self, request: GenerateRequest, prompt: list[int]) -> Row:
        refuse_unknown_bias(request.sampling, self._vocabulary)
        return Row(
            prompt,
            request.sampling,
            matcher=self._grammars.matcher(request.grammar) if request.grammar else None,
            num_logprobs=request.num_logprobs,
            num_prompt_logprobs=request.num_prompt_logprobs,
        )

    def _known(self, row: Row, begin: int, number: int) -> dict[str, Any]:
        """What a row knows of `number` new tokens from the `begin`th on, and at first of the prompt."""
        known: dict[str, Any] = {"num_cached_tokens": row.num_cached or 0}
        if row.num_logprobs is not None:
            known["logprobs"] = tuple(map(self._spelled, row.logprobs[begin : begin + number]))
        if row.num_prompt_logprobs is not None and begin == 0:
            places = [row.prompt_logprobs[place] for place in range(1, len(row.prompt))]
            first = TokenLogprob(self._grammars.candidate(row.prompt[0], None), ())
            known["prompt_logprobs"] = (first, *map(self._spelled, places))
        return known

    def _spelled(self, place: PlaceLogprobs) -> TokenLogprob:
        return TokenLogprob(
            self._grammars.candidate(place.token_id, place.logprob),
            tuple(self._grammars.candidate(token, logprob) for token, logprob in place.top),
        )

    async def close(self) -> None:
        self._preparers.close()
        await asyncio.to_thread(self._hooks.close)

    def _new_manager(self) -> LevelManager:
        generation = generation_config(self._text.stop_ids)
        batching = ContinuousBatchingConfig(**self._batching)
        return LevelManager(
            self._model,
            generation,
            batching,
            self._num_threads,
            self._masks.forget_step,
            self._on_end,
            self._compiled,
        )

    def _start_manager(self) -> None:
        """Build manager and cache, and serve with them.

        Raises:
            ModelError: there is no memory for the cache, or the model cannot be served, or not be modulated.
        """
        if self._manager.is_discarded:
            self._manager = self._new_manager()
        try:
            with on_one_core():
                self._manager.warmup()  # allocates the cache here, so that a failure is raised here
        except (MemoryError, RuntimeError, ValueError) as error:
            details, number = self._info.details, self._batching["max_requests_per_batch"]
            raise ModelError(
                f"A KV cache of {details['kv_cache_tokens']} tokens for {number} requests at once cannot "
                f"be allocated ({error}). Lower kv_cache_tokens or max_num_seqs."
            ) from error
        self._manager.start()
        with passing_all_sites(self._model):
            self._probe()
        self._manager.count_in(self._tally)
        self._manager.deliver_to_handlers_only()

    def _stop_manager(self) -> None:
        self._manager.discard()
        self._masks.forget_step()

    def _probe(self) -> None:
        """Run a few steps at mixed levels: an engine that returns from its constructor can serve.

        Raises:
            ModelError: the model's code cannot run in continuous batching.
        """
        if self._compiled:
            # Sizes that are equal when it is compiled are taken to be so always.
            long = min(self._manager.more_tokens_than_rows, self._info.max_model_len - 2)
            for lengths in ([long], [long, 3]):  # of a single request, and of one token, it is compiled apart
                self._probe_with([(length, ZERO) for length in lengths])
        self._probe_with([(number + 2, each.threshold) for number, each in enumerate(self._info.levels)])

    def _probe_with(self, probes: Sequence[tuple[int, Threshold]]) -> None:
        """As many requests as there are pairs of a prompt's length and a threshold, together."""
        mask = self._masks.current
        for number, (length, threshold) in enumerate(probes):
            prompt = (0,) * length
            request = GenerateRequest(prompt, threshold, Sampling(temperature=number % 2))
            self._manager.add_request(
                list(prompt),
                request_id=request_id(next(self._numbers), threshold, mask.number),
                max_new_tokens=2,
                **self._arguments(request, Row(prompt, request.sampling), mask.value).as_keywords(),
            )
        for _ in probes:
            output = self._probed()
            if output is None or output.error is not None:
                raise ModelError(
                    f"Model {self._model_name!r} ({type(self._model).__name__}) cannot run in transformers' "
                    f"continuous batching: {output.error if output else 'no answer in time'}."
                    + (" Leave --compile out to run it as it is." if self._compiled else "")
                )

    def _probed(self) -> GenerationOutput | None:
        """The next answer of a probe; None: too late, or the engine is being closed."""
        limit = _COMPILE_TIMEOUT_SECONDS if self._compiled else _PROBE_TIMEOUT_SECONDS
        deadline = time.monotonic() + limit
        while time.monotonic() < deadline and not self._supervisor.is_closed:
            output = self._manager.get_result(timeout=1.0)
            if output is not None or not self._manager.is_running():
                return output
        return None

    def _arguments(self, request: GenerateRequest, row: Row, mask: RequestMask) -> RowArguments:
        sampling = request.sampling
        greedy = sampling.temperature < _GREEDY_BELOW
        if greedy:
            sampling = Sampling(temperature=1.0, seed=0)
        seed = secrets.randbits(64) if sampling.seed is None else sampling.seed
        return RowArguments(
            num_safety=request.threshold.num_safety,
            num_utility=request.threshold.num_utility,
            temperature=sampling.temperature,
            noise=0.0 if greedy else 1.0,
            top_k=min(sampling.top_k or self._vocabulary, self._vocabulary),
            top_p=sampling.top_p,
            seed=seed & (1 << 64) - 1,
            row=row,
            mask=mask,
        )

    def _finish_reason(self, step: _Step) -> FinishReason | None:
        if not step.is_last:
            return None
        ended = bool(step.tokens) and step.tokens[-1] in self._text.stop_ids
        return "stop" if ended else "length"

    def _on_end(self, manager: LevelManager) -> None:
        """A manager's loop has ended: nothing more will come, so nobody must wait for it."""
        if manager is self._manager:
            self._supervisor.ended(manager.why_ended)
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._fail_open_requests, manager)

    def _fail_open_requests(self, manager: LevelManager) -> None:
        for owner, steps in self._open.values():
            if owner is manager:
                steps.end()

    def _why_not_ready(self) -> str | None:
        serves = self._manager.is_serving
        return self._supervisor.reason or (None if serves else "the engine has stopped")

    def _refuse_if_closed(self) -> None:
        if self._supervisor.is_closed:
            raise self._unavailable()

    def _refuse_if_not_ready(self) -> None:
        if self._why_not_ready() is not None:
            raise self._unavailable()

    def _unavailable(self, cause: str | None = None) -> EngineUnavailableError:
        closed = self._supervisor.is_closed
        reason = (None if closed else cause) or self._why_not_ready() or "the engine has stopped"
        return EngineUnavailableError(
            f"No answer can be generated: {reason}.",
            None if closed else self._supervisor.retry_after_seconds,
        )
