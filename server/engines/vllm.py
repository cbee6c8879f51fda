"""The scale engine: vLLM, in process, with modulation in its workers.

Knows vLLM's `AsyncLLM` and the RPCs of `vllm_worker`. Knows nothing of HTTP or settings.

A request's threshold and the slot of its mask ride in `SamplingParams.extra_args`, and are part of
`cache_salt`, so that what was computed under one threshold or mask is never found under another; vLLM itself
keeps adapters apart. vLLM lives on an event loop and a thread of its own: it can be proved to be modulated
before anybody serves, and whoever asks may come from any loop.
"""

import asyncio
import itertools
import multiprocessing
import signal
import threading
import time
from collections.abc import AsyncGenerator, Callable, Coroutine
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any, Final, TypeVar

from vllm import SamplingParams
from vllm.inputs import tokens_input
from vllm.outputs import RequestOutput
from vllm.utils.system_utils import kill_process_tree
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from modulation.errors import ModelError
from modulation.levels import Threshold
from modulation.loading import load_tokenizer, resolve_dtype
from modulation.masks import Mask
from modulation.profiles import profile_of
from modulation.recorded import refuse_less_safe
from modulation.shapes import read_shape
from server.engines.base import (
    EngineHealth,
    EngineInfo,
    EngineUnavailableError,
    FinishReason,
    GenerateRequest,
    GenerationError,
    Output,
    Tallies,
)
from server.engines.in_force import InForce
from server.engines.limits import refuse_unknown_adapter, token_limit
from server.engines.preparing import Preparers, TokenizingEngine
from server.engines.sizes import resolve_sizes, stop_ids
from server.engines.supervision import leave_it
from server.engines.text import ChatText
from server.engines.vllm_adapters import read_adapters
from server.engines.vllm_arguments import VllmArguments, device_of_vllm, engine_arguments
from server.engines.vllm_dialect import Dialect, queued_seconds
from server.engines.vllm_proof import prove_in_force
from server.engines.vllm_stats import VllmStats
from server.engines.vllm_worker import EXTRA_ARGS_KEY, NUM_SLOTS

_WATCH_SECONDS: Final = 0.1
_PAGE_SIZE: Final = 128
# Supported families that vLLM has no model of its own for. The worker refuses any other such model.
_FOREIGN: Final = frozenset({"gpt_neox", "olmo2"})
_START_SECONDS: Final = 1800.0
_END_SECONDS: Final = 30.0
_DIED: Final = "one of vLLM's processes has died"
T = TypeVar("T")


class VllmEngine(TokenizingEngine):
    """An `Engine` on vLLM. Raises, from the constructor, what keeps it from being ready.

    vLLM does not come back from the death of one of its processes: requests end, the engine is not ready any
    more and `on_fatal` is called once, on a thread of its own, so that a supervisor starts the server anew.

    Raises:
        ModelError: the model, its tokenizer or an argument cannot be used, or modulation is not in force.
        MaskError: as the transformers engine.
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
        trust_remote_code: bool = False,
        allow_less_safe_levels: bool = False,
        arguments: VllmArguments | None = None,
        on_fatal: Callable[[str], None] = leave_it,
    ) -> None:
        arguments = arguments or VllmArguments()
        tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
        loaded_mask = Mask.load(mask)
        _refuse_among_weights(mask, model)
        self._allows_less_safe = allow_less_safe_levels
        self._refuse_less_safe(loaded_mask)
        self._shape = read_shape(model, trust_remote_code=trust_remote_code)
        _refuse_foreign(self._shape.model.config.get_text_config().model_type)
        self._verify(loaded_mask)
        on_device = device_of_vllm(device)
        in_dtype = resolve_dtype(dtype, on_device.value)
        sizes = resolve_sizes(
            self._shape.model,
            device=on_device.value,
            max_model_len=max_model_len,
            kv_cache_tokens=kv_cache_tokens,
            page_size=_PAGE_SIZE,
        )
        config = self._shape.model.config.get_text_config()
        bounds_cache = kv_cache_tokens is not None or on_device.value == "cpu"
        self._adapters = read_adapters(arguments.lora, served_model_name, self._shape.model)
        engine_args = engine_arguments(
            model,
            config,
            sizes,
            arguments,
            self._adapters,
            on_device=on_device.value,
            dtype=in_dtype.value,
            bounds_cache=bounds_cache,
            max_num_seqs=max_num_seqs,
            prefix_caching=prefix_caching,
            trust_remote_code=trust_remote_code,
        )
        ends = stop_ids(self._shape.model, tokenizer)
        self._dialect = Dialect(tokenizer, int(config.vocab_size), ends)
        self._in_force = InForce(loaded_mask.digest, 1)  # the value is the mask's slot in the workers
        self._swapping = asyncio.Lock()
        self._released = asyncio.Event()
        self._numbers = itertools.count()
        self._preparers = Preparers(lambda prompt: self._text.encode(prompt), self._refuse_if_not_ready)
        self._open: dict[str, _Stream] = {}
        self._stats = VllmStats(lambda: len({each.threshold for each in list(self._open.values())}))
        self._why_ended: str | None = None
        self._on_fatal = on_fatal
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run_loop, name="vllm", daemon=True)
        self._thread.start()
        self._llm: AsyncLLM | None = None
        self._starting: Future[AsyncLLM] = Future()
        self._not_ours = set(multiprocessing.active_children())
        try:
            self._llm = self._waited_for(self._started(engine_args))
            length = int(self._llm.model_config.max_model_len)
            self._text = ChatText(tokenizer, ends, int(config.vocab_size), length)
            self._waited_for(self._prepared_workers(loaded_mask))
        except BaseException:
            self._why_ended = "the engine could not start"
            # On a thread that the process waits for: a second Ctrl-C would leave vLLM's processes behind.
            end = threading.Thread(target=self._end, name="vllm-end")
            end.start()
            end.join()
            raise
        self._info = EngineInfo(
            model_id=served_model_name,
            max_model_len=length,
            levels=loaded_mask.levels,
            mask_digest=loaded_mask.digest,
            details={
                "engine": "vllm",
                "device": str(on_device),
                "dtype": str(in_dtype),
                "max_model_len": str(sizes.max_model_len),
                "kv_cache_tokens": str(sizes.cache_tokens) if bounds_cache else "what memory there is (vLLM)",
                "prefix_caching": str(prefix_caching).lower(),
                **arguments.details,
            },
            mask=profile_of(loaded_mask),
            adapters=tuple(self._adapters.by_name),
        )
        self._stats.counts = True
        self._watch = asyncio.run_coroutine_threadsafe(self._watched(), self._loop)

    def describe(self) -> EngineInfo:
        return self._info

    async def use_mask(self, mask: Mask) -> EngineInfo:
        self._refuse_less_safe(mask)
        await asyncio.to_thread(self._verify, mask)
        self._refuse_if_not_ready()
        putting = asyncio.run_coroutine_threadsafe(self._put_in_force(mask), self._loop)
        try:
            await asyncio.wrap_future(putting)
        except EngineDeadError as error:
            raise self._unavailable(_DIED) from error
        self._info = replace(self._info, levels=mask.levels, mask_digest=mask.digest, mask=profile_of(mask))
        return self._info

    def healthy(self) -> EngineHealth:
        if self._why_ended is not None:
            return EngineHealth(False, self._why_ended, 0, 0)
        num_waiting = sum(not stream.has_begun for stream in self._open.values())
        return EngineHealth(True, "", len(self._open) - num_waiting, num_waiting)

    def tallies(self) -> Tallies:
        return self._stats.now(len(self._open))

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Output, None]:
        begun = time.monotonic()
        self._refuse_if_not_ready()
        refuse_unknown_adapter(request.adapter, self._info.adapters)
        prompt = await self._preparers.encoded(request.prompt)
        limit = token_limit(self._info.max_model_len, len(prompt), request.max_tokens)
        # Off the event loop, like tokenising: a large schema takes seconds to compile.
        said = self._dialect.sampling
        sampling = await self._preparers.run(said, request, limit) if request.grammar else None
        sampling = sampling or said(request, limit)
        self._refuse_if_not_ready()
        name = f"request-{next(self._numbers)}"
        stream = _Stream(asyncio.get_running_loop(), request.threshold)
        self._open[name] = stream
        feeding = asyncio.run_coroutine_threadsafe(
            self._feed(stream, name, prompt, sampling, request), self._loop
        )
        text, seen, queued = self._text.stream(request.prompt), 0, 0.0
        try:
            while True:
                step = await stream.next()
                if isinstance(step, BaseException):
                    raise step
                answer = step.outputs[0]
                finish = self._finish_reason(answer.finish_reason)
                queued = queued or queued_seconds(step, begun)
                known = self._dialect.known(request, step, limit) | {"queued_seconds": queued}
                if not limit:
                    yield Output("", (), "length", len(prompt), 0, **known)
                    return
                tokens = tuple(answer.token_ids)
                seen += len(tokens)
                yield Output(
                    text=text.push(tokens) + (text.finish() if finish else ""),
                    token_ids=tokens,
                    finish_reason=finish,
                    num_prompt_tokens=len(prompt),
                    num_completion_tokens=seen,
                    **known,
                )
                if finish:
                    return
        finally:
            self._open.pop(name, None)
            feeding.cancel()  # vLLM aborts what is cancelled; what has ended cannot be

    async def close(self) -> None:
        if self._why_ended is None:
            self._why_ended = "the engine is closed"
        self._preparers.close()
        self._fail_open_requests()
        await asyncio.to_thread(self._end)

    async def _feed(
        self,
        stream: "_Stream",
        name: str,
        prompt: list[int],
        sampling: SamplingParams,
        request: GenerateRequest,
    ) -> None:
        """Hand what vLLM says of a request on to its stream. On vLLM's loop, which keeps its mask known."""
        assert self._llm is not None
        try:
            with self._in_force.held(request.mask_digest) as mask:
                threshold = request.threshold
                row = [threshold.num_safety, threshold.num_utility, mask.value]
                sampling.extra_args = {EXTRA_ARGS_KEY: row}
                salt = f"{mask.digest}:{threshold.num_safety}:{threshold.num_utility}:{request.cache_salt}"
                asked = tokens_input(prompt, cache_salt=salt)
                lora = None if request.adapter is None else self._adapters.by_name[request.adapter]
                async for step in self._llm.generate(asked, sampling, name, lora_request=lora):
                    stream.put(step)
        except EngineUnavailableError as error:
            stream.put(error)
        except EngineDeadError:
            self._has_died()
            stream.put(self._unavailable())
        except Exception as error:
            cause = error.__cause__ or error
            reason = str(cause).strip().partition("\n")[0] or type(cause).__name__
            stream.put(GenerationError(f"This answer could not go on: {reason}"))
        finally:
            self._released.set()

    async def _put_in_force(self, mask: Mask) -> None:
        """Put a mask into a slot that nobody uses, and that slot in force. On vLLM's loop."""
        async with self._swapping:
            if self._in_force.find(mask.digest) is None:
                slot = await self._free_slot()
                await self._fill(slot, mask)
                self._in_force.put(mask.digest, slot)
            else:
                self._in_force.put_back(mask.digest)

    async def _free_slot(self) -> int:
        """A slot that no request can come to use. There are more than two masks only while requests run that
        began under an older one; when there are as many as slots, a swap waits for one of those to end."""
        while True:
            self._released.clear()
            free = set(range(1, NUM_SLOTS)) - set(self._in_force.values())
            if free:
                return min(free)
            await self._released.wait()

    async def _fill(self, slot: int, mask: Mask) -> None:
        """Raises ModelError where the ranks together have not put every neuron of the mask in force."""
        assert self._llm is not None
        counts = await self._llm.collective_rpc("neurontune_put_mask", args=(slot, mask.to_bytes()))
        expected = len(mask.safety) + len(mask.utility)
        if sum(counts) != expected:
            raise ModelError(
                f"The ranks have put {sum(counts)} of the mask's {expected} neurons in force ({counts}). "
                "Nothing is served."
            )

    async def _started(self, engine_args: Any) -> AsyncLLM:
        started = self._starting
        started.set_running_or_notify_cancel()  # nobody cancels what the thread will set

        def start() -> None:
            try:
                started.set_result(AsyncLLM.from_engine_args(engine_args, stat_loggers=[self._stats.logger]))
            except BaseException as error:
                started.set_exception(error)

        # A daemon: who gives up waiting for vLLM ends without it.
        threading.Thread(target=start, name="vllm-start", daemon=True).start()
        try:
            return await asyncio.wrap_future(started)
        except Exception as error:
            raise ModelError(f"vLLM cannot start: {_brief(error)}") from error

    async def _prepared_workers(self, mask: Mask) -> None:
        assert self._llm is not None
        for adapter in self._adapters.by_name.values():
            try:
                await self._llm.add_lora(adapter)
            except Exception as error:
                raise ModelError(
                    f"vLLM cannot load the adapter {adapter.lora_name} ({adapter.lora_path}): {_brief(error)}"
                ) from error
        prompt = self._text.encode("0")[:1] * 8
        await prove_in_force(self._llm, prompt)
        await self._fill(self._in_force.current.value, mask)

    def _run_loop(self) -> None:
        """vLLM's loop, on its thread. Ctrl-C in a terminal reaches every process of its group, and vLLM's
        would end before this one has drained. They inherit what this thread blocks; the resource tracker,
        which would unblock it as it starts, runs before."""
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        self._loop.run_forever()

    async def _watched(self) -> None:
        """Say so when vLLM has died. It is asked, since it tells nobody who is not waiting for an answer."""
        assert self._llm is not None
        while not self._llm.errored:
            await asyncio.sleep(_WATCH_SECONDS)
        self._has_died()

    def _has_died(self) -> None:
        """On vLLM's loop. Whoever is told of it finds the engine not ready."""
        if self._why_ended is None:
            self._why_ended = _DIED
            self._fail_open_requests()
            threading.Thread(target=self._on_fatal, args=(self._why_ended,), name="vllm-end").start()

    def _fail_open_requests(self) -> None:
        for stream in list(self._open.values()):
            stream.put(self._unavailable())
        self._open.clear()

    def _end(self) -> None:
        """Stop vLLM and its loop. On any thread but its own."""
        if self._loop.is_closed():
            return
        with suppress(Exception):
            self._waited_for(_cancel_all())
        if self._llm is not None:
            self._llm.shutdown()
        else:
            self._give_up_start()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _give_up_start(self) -> None:
        """End what vLLM has started, and what it still starts: its processes heed neither Ctrl-C nor, while
        they load, SIGTERM. Without them the start fails."""
        deadline = time.monotonic() + _END_SECONDS
        while time.monotonic() < deadline:
            for child in set(multiprocessing.active_children()) - self._not_ours:
                if child.pid is not None:
                    kill_process_tree(child.pid)
            if not self._starting.running():
                break
            time.sleep(_WATCH_SECONDS)

    def _waited_for(self, work: Coroutine[Any, Any, T]) -> T:
        """What `work` gives, run on vLLM's loop while this thread waits."""
        found: Future[T] = asyncio.run_coroutine_threadsafe(work, self._loop)
        return found.result(_START_SECONDS)

    def _finish_reason(self, reason: str | None) -> FinishReason | None:
        """Raises what an end that is no answer's stands for."""
        if reason is None:
            return None
        if reason == "abort":
            raise self._unavailable("vLLM has ended the request")
        if reason not in ("stop", "length"):
            raise GenerationError(f"This answer could not go on: vLLM ended it by {reason!r}.")
        return "stop" if reason == "stop" else "length"

    def _verify(self, mask: Mask) -> None:
        mask.verify(self._shape.model, self._shape.fingerprint)

    def _refuse_less_safe(self, mask: Mask) -> None:
        if not self._allows_less_safe:
            refuse_less_safe(mask)

    def _refuse_if_not_ready(self) -> None:
        if self._why_ended is not None:
            raise self._unavailable()

    def _unavailable(self, cause: str | None = None) -> EngineUnavailableError:
        reason = self._why_ended or cause or "the engine has stopped"
        return EngineUnavailableError(f"No answer can be generated: {reason}.")


class _Stream:
    """What a request's loop hears from vLLM's."""

    def __init__(self, loop: asyncio.AbstractEventLoop, threshold: Threshold) -> None:
        self._loop = loop
        self.threshold = threshold
        self._steps: asyncio.Queue[RequestOutput | Exception] = asyncio.Queue()
        self.has_begun = False

    def put(self, step: RequestOutput | Exception) -> None:
        """On any thread. A loop that has been closed hears nothing any more."""
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._steps.put_nowait, step)

    async def next(self) -> RequestOutput | Exception:
        step = await self._steps.get()
        self.has_begun = True
        return step


async def _cancel_all() -> None:
    """End whatever still runs on this loop."""
    others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


def _brief(error: BaseException) -> str:
    """What an error says in its first lines, as one: pydantic's first only counts, the next name and tell."""
    lines = [line.strip() for line in str(error).strip().splitlines()[:3]]
    return " ".join(lines) or type(error).__name__


def _refuse_foreign(family: str) -> None:
    if family in _FOREIGN:
        raise ModelError(
            f"vLLM runs models of the family {family} through transformers' own modules, where they "
            "cannot be modulated. Serve it with --engine transformers."
        )


def _refuse_among_weights(mask: Path, model: str) -> None:
    if mask.suffix == ".safetensors" and mask.parent.resolve() == Path(model).resolve():
        raise ModelError(
            f"The mask {mask} lies in the model's folder, where vLLM takes every *.safetensors for weights. "
            "Move it to another folder."
        )
