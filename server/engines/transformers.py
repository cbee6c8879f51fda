"""The embedded engine: transformers' continuous batching with modulation by forward hooks.

Knows the model, its mask and the batching manager. Knows nothing of HTTP or settings.

Each step, the manager packs the tokens of all running requests into one row. The arguments of each
request, its threshold among them, ride in static storage that the model's forward receives
(`sampling`); a pre-hook on the model expands thresholds to tokens, and the modulators' pre-hooks on
the sites apply them (`masks`).
"""

import asyncio
import itertools
import logging
import secrets
from collections.abc import AsyncGenerator
from contextlib import ExitStack, aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import ContinuousBatchingConfig
from transformers.generation.continuous_batching.requests import GenerationOutput

from modulation.errors import ModelError
from modulation.loading import load_model, load_tokenizer, resolve_device, resolve_dtype
from modulation.masks import Mask
from modulation.recorded import refuse_less_safe
from server.engines.base import (
    Candidate,
    Chat,
    EngineHealth,
    EngineInfo,
    EngineUnavailableError,
    FinishReason,
    GenerateRequest,
    GenerationError,
    Grammar,
    Output,
    ParsedAnswer,
    Prompt,
    PromptError,
    PromptTooLongError,
    Sampling,
    TokenLogprob,
)
from server.engines.batching import LevelManager, request_id
from server.engines.grammar import Grammars
from server.engines.masks import Masks, RequestMask
from server.engines.rows import PlaceLogprobs, Row
from server.engines.sampling import NUM_THRESHOLD_ROWS, RowArguments
from server.engines.sizes import generation_config, resolve_sizes, stop_ids
from server.engines.text import ChatText

_PAGE_SIZE: Final = 32
# Dividing logits by less would overflow float32; sampling has long become greedy there.
_GREEDY_BELOW: Final = 1e-5
_PROBE_TIMEOUT_SECONDS: Final = 300.0
_MAX_STEP_TOKENS: Final = {"cpu": 512, "cuda": 2048}


class TransformersEngine:
    """An `Engine` on transformers. Raises, from the constructor, what keeps it from being ready.

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
        trust_remote_code: bool = False,
        allow_less_safe_levels: bool = False,
    ) -> None:
        # What the manager says about its own choices at INFO is noise beside `describe`.
        logging.getLogger("ContinuousBatchingLogger").setLevel(logging.WARNING)
        tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
        loaded_mask = Mask.load(mask)
        if not allow_less_safe_levels:
            refuse_less_safe(loaded_mask)
        on_device = resolve_device(device)
        in_dtype = resolve_dtype(dtype, on_device.value)
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
        self._masks = Masks(self._model, loaded_mask)
        ends = stop_ids(self._model, tokenizer)
        self._vocabulary = int(self._model.config.get_text_config().vocab_size)
        self._text = ChatText(tokenizer, ends, self._vocabulary)
        self._grammars = Grammars(tokenizer, self._vocabulary, ends)
        # As the processors have it, with the tokens as a tensor.
        self._scored: list[tuple[Row, int, Tensor]] = []
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
            },
        )
        self._numbers = itertools.count()
        self._open: dict[str, asyncio.Queue[GenerationOutput | None]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False
        batching = ContinuousBatchingConfig(
            page_size=_PAGE_SIZE,
            num_blocks=sizes.num_pages,
            max_batch_tokens=max(_MAX_STEP_TOKENS[on_device.value], max_num_seqs),
            max_requests_per_batch=max_num_seqs,
            allow_block_sharing=prefix_caching,
            # Both would switch themselves on on some GPUs; neither has been tested with modulation.
            auto_switch_to_flash=False,
            use_cuda_graph=False,
            # Penalties and grammars need to know a step's token before the next one begins.
            use_async_batching=False,
        )
        generation = generation_config(ends)
        with ExitStack() as stack:
            stack.enter_context(self._masks)
            hook = self._model.register_forward_pre_hook(self._set_thresholds, with_kwargs=True)
            stack.callback(hook.remove)
            stack.callback(self._model.register_forward_hook(self._take_scored).remove)
            self._manager = LevelManager(self._model, generation, batching, self._on_end)
            try:
                self._manager.warmup()  # allocates the cache here, so that a failure is raised here
            except (MemoryError, RuntimeError, ValueError) as error:
                raise ModelError(
                    f"A KV cache of {sizes.cache_tokens} tokens for {max_num_seqs} requests at once cannot "
                    f"be allocated ({error}). Lower kv_cache_tokens or max_num_seqs."
                ) from error
            stack.callback(self._stop_manager)
            self._manager.start()
            self._probe(model)
            self._manager.deliver_to_handlers_only()
            self._hooks = stack.pop_all()

    def describe(self) -> EngineInfo:
        return self._info

    async def use_mask(self, mask: Mask) -> EngineInfo:
        await self._masks.use(mask)
        self._info = replace(self._info, levels=mask.levels, mask_digest=mask.digest)
        return self._info

    def healthy(self) -> EngineHealth:
        processor = self._manager.batch_processor
        scheduler = processor.scheduler if processor is not None else None
        reason = self._why_not_ready()
        return EngineHealth(
            ready=reason is None,
            reason=reason or "",
            num_running=len(scheduler.active_requests) if scheduler else 0,
            num_waiting=(len(scheduler.waiting_requests) if scheduler else 0)
            + self._manager.input_queue.qsize(),
        )

    async def encode(self, prompt: Prompt) -> tuple[int, ...]:
        return tuple(await asyncio.to_thread(self._text.encode, prompt))

    async def decode(self, token_ids: tuple[int, ...]) -> str:
        return await asyncio.to_thread(self._text.decode, token_ids)

    async def spell(self, token_ids: tuple[int, ...]) -> tuple[str, ...]:
        return tuple(await asyncio.to_thread(self._text.spell, token_ids))

    def parse(self, text: str, chat: Chat) -> ParsedAnswer:
        return self._text.parse(text, chat)

    def tool_grammar(self, chat: Chat, name: str | None, several: bool) -> Grammar:
        return self._text.tool_grammar(chat, name, several)

    @property
    def tool_marker(self) -> str:
        return self._text.tool_marker

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Output, None]:
        with self._masks.held(request.mask_digest) as mask:
            # Off the event loop: a prompt of megabytes takes seconds to tokenise, a large schema to compile.
            prompt, limit, row = await asyncio.to_thread(self._prepared, request)
            self._refuse_if_not_ready()
            shares = row.num_prompt_logprobs is None
            name = request_id(next(self._numbers), request.threshold, mask.number, shares_prefixes=shares)
            arguments = self._arguments(request, row, mask.value)
            text, seen = self._text.stream(request.prompt), 0
            async with aclosing(self._steps(name, prompt, limit, arguments)) as steps:
                async for step in steps:
                    if not limit:
                        yield Output("", (), "length", len(prompt), 0, **self._known(row, 0, 0))
                        return
                    tokens = tuple(step.generated_tokens[seen:])
                    known = self._known(row, seen, len(tokens))
                    seen += len(tokens)
                    finish = self._finish_reason(step)
                    yield Output(
                        text=text.push(tokens) + (text.finish() if finish else ""),
                        token_ids=tokens,
                        finish_reason=finish,
                        num_prompt_tokens=len(prompt),
                        num_completion_tokens=seen,
                        **known,
                    )

    async def _steps(
        self, name: str, prompt: list[int], limit: int, arguments: RowArguments
    ) -> AsyncGenerator[GenerationOutput, None]:
        """What the manager says of a request after each of its steps, up to the last one.

        Raises:
            EngineUnavailableError: the manager has ended.
            GenerationError: the request cannot go on.
        """
        self._loop = asyncio.get_running_loop()
        outputs: asyncio.Queue[GenerationOutput | None] = asyncio.Queue()
        self._open[name] = outputs
        try:
            self._manager.register_result_handler(name, outputs.put_nowait)
            added = self._manager.add_request(
                prompt,
                request_id=name,
                max_new_tokens=max(1, limit),
                streaming=True,
                **arguments.as_keywords(),
            )
            if added is None or not self._manager.is_running():
                raise self._unavailable()
            while True:
                step = await outputs.get()
                if step is None or step.error is not None:
                    raise self._unavailable(step.error if step else None)
                if arguments.row.error is not None:
                    raise GenerationError(f"This answer could not go on: {arguments.row.error}.")
                yield step
                if step.is_finished():
                    return
        finally:
            del self._open[name]
            self._manager.forget(name)

    def _prepared(self, request: GenerateRequest) -> tuple[list[int], int, Row]:
        """The prompt's tokens, the most that may be generated, and the request's row."""
        prompt = self._text.encode(request.prompt)
        limit = self._token_limit(len(prompt), request.max_tokens)
        return prompt, limit, self._row(request, prompt)

    def _row(self, request: GenerateRequest, prompt: list[int]) -> Row:
        for token, _ in request.sampling.logit_bias:
            if token >= self._vocabulary:
                raise PromptError(
                    f"logit_bias: {token} is no token of this model; accepted: 0 to {self._vocabulary - 1}.",
                    "logit_bias",
                )
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
            first = TokenLogprob(self._candidate(row.prompt[0], None), ())
            known["prompt_logprobs"] = (first, *map(self._spelled, places))
        return known

    def _spelled(self, place: PlaceLogprobs) -> TokenLogprob:
        return TokenLogprob(
            self._candidate(place.token_id, place.logprob),
            tuple(self._candidate(token, logprob) for token, logprob in place.top),
        )

    def _candidate(self, token_id: int, logprob: float | None) -> Candidate:
        spelling = self._grammars.spelling(token_id)
        try:
            text = spelling.decode()
        except UnicodeDecodeError:  # part of a character; as OpenAI writes it
            text = "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelling)
        return Candidate(token_id, text, spelling, logprob)

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        await asyncio.to_thread(self._hooks.close)

    def _probe(self, model: str) -> None:
        """Run a few steps at mixed levels: an engine that returns from its constructor can serve.

        Raises:
            ModelError: the model's code cannot run in continuous batching.
        """
        mask = self._masks.current
        for number, level in enumerate(self._info.levels):
            prompt = (0,) * (number + 2)
            request = GenerateRequest(prompt, level.threshold, Sampling(temperature=number % 2))
            self._manager.add_request(
                list(prompt),
                request_id=request_id(next(self._numbers), level.threshold, mask.number),
                max_new_tokens=2,
                **self._arguments(request, Row(prompt, request.sampling), mask.value).as_keywords(),
            )
        for _ in self._info.levels:
            output = self._manager.get_result(timeout=_PROBE_TIMEOUT_SECONDS)
            if output is None or output.error is not None:
                raise ModelError(
                    f"Model {model!r} ({type(self._model).__name__}) cannot run in transformers' "
                    f"continuous batching: {output.error if output else 'no answer in time'}."
                )

    def _stop_manager(self) -> None:
        self._manager.stop(block=True, hard_stop=True)

    def _set_thresholds(
        self, _model: nn.Module, args: Any, step: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]] | None:
        """Before each step: one threshold per token, from one per request."""
        per_request: Tensor = step["logits_processor_args"][:NUM_THRESHOLD_ROWS].T  # (requests, 2)
        ends: Tensor = step["cu_seq_lens_q"][1:]  # (requests,)
        num_tokens = step["input_ids"].shape[-1]
        tokens = torch.arange(num_tokens, dtype=ends.dtype, device=ends.device)
        # A padding token lies beyond the last end; it takes the last request's threshold.
        owner = torch.searchsorted(ends, tokens, right=True).clamp_(max=len(ends) - 1)
        self._masks.before_step(per_request, owner, self._manager.processors.masks())
        self._scored = [
            (row, place, torch.arange(tokens.start, tokens.stop, dtype=ends.dtype, device=ends.device))
            for row, place, tokens in self._manager.processors.scored
        ]
        if not self._scored or "logits_to_keep" not in step:
            return None
        kept = torch.cat([step["logits_indices"], *(tokens for _, _, tokens in self._scored)])
        return args, step | {"logits_to_keep": kept}

    def _take_scored(self, _model: nn.Module, _args: Any, output: Any) -> None:
        """After each step: hand the logits of prompts to their rows, and leave the manager its own."""
        if not self._scored:
            return
        logits: Tensor = output.logits
        num_scored = sum(len(tokens) for _, _, tokens in self._scored)
        if self._manager.keeps_logits:
            scored = logits[0, -num_scored:]
            output.logits = logits[:, :-num_scored]
        else:
            scored = logits[0, torch.cat([tokens for _, _, tokens in self._scored])]
        for row, place, tokens in self._scored:
            row.saw_prompt(place, scored[: len(tokens)].float())
            scored = scored[len(tokens) :]

    def _token_limit(self, num_prompt_tokens: int, max_tokens: int | None) -> int:
        room = self._info.max_model_len - num_prompt_tokens
        if room < 1:
            raise PromptTooLongError(
                f"The prompt is {num_prompt_tokens} tokens long; with at least one token of answer it "
                f"must fit the context of {self._info.max_model_len}. Shorten the messages."
            )
        if max_tokens is not None and max_tokens > room:
            raise PromptTooLongError(
                f"The prompt's {num_prompt_tokens} tokens and max_tokens {max_tokens} together exceed "
                f"the context of {self._info.max_model_len}. Lower max_tokens to {room} or less, or "
                "leave it out."
            )
        return room if max_tokens is None else max_tokens

    def _arguments(self, request: GenerateRequest, row: Row, mask: RequestMask) -> RowArguments:
        sampling = request.sampling
        greedy = sampling.temperature < _GREEDY_BELOW
        if greedy:
            sampling = Sampling(temperature=1.0)
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

    def _finish_reason(self, step: GenerationOutput) -> FinishReason | None:
        if not step.is_finished():
            return None
        ended = bool(step.generated_tokens) and step.generated_tokens[-1] in self._text.stop_ids
        return "stop" if ended else "length"

    def _on_end(self) -> None:
        """The manager's loop has ended: nothing more will come, so nobody must wait for it."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._fail_open_requests)

    def _fail_open_requests(self) -> None:
        for outputs in self._open.values():
            outputs.put_nowait(None)

    def _why_not_ready(self) -> str | None:
        if self._closed:
            return "the engine is closed"
        error = self._manager.background_thread_status.fatal_error
        if error is not None:
            return f"the engine has stopped: {error}"
        if not self._manager.is_running():
            return "the engine is not running"
        refusal = self._manager.background_thread_status.can_accept_new_requests()
        return refusal and refusal.removesuffix(".")

    def _refuse_if_not_ready(self) -> None:
        if self._why_not_ready() is not None:
            raise self._unavailable()

    def _unavailable(self, error: str | None = None) -> EngineUnavailableError:
        reason = (None if self._closed else error) or self._why_not_ready() or "the engine has stopped"
        return EngineUnavailableError(f"No answer can be generated: {reason}.")
