"""Everything at once: clients that come and leave, masks that are swapped, steps that fail in every way."""

import asyncio
import math
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from modulation.masks import Mask
from server.engines.base import EngineUnavailableError, GenerateRequest, GenerationError, Sampling
from server.engines.rows import Row
from server.engines.transformers import TransformersEngine
from tests.engines.contract import collect, is_idle, tokens, until
from tests.engines.test_transformers import THRESHOLDS, ask, serving
from tests.tiny_models import random_mask, save_mask, scaled, tiny_chat_folder

pytestmark = pytest.mark.anyio

SECONDS = 6.0
REQUESTS = [
    ask(
        f"question {i} " + "words of a system " * (i % 4 * 14) + "!" * (i * 7),
        THRESHOLDS[i % 6],
        Sampling(temperature=float(i % 2), seed=i),
        max_tokens=10 + i,
        num_logprobs=2 if i % 3 == 0 else None,
    )
    for i in range(12)
]


class Faults:
    """While `on`: one step in 60 has no memory, one in 200 raises, and one request in 20 gives NaN."""

    def __init__(self, engine: TransformersEngine) -> None:
        self.on = False
        self._source, self._engine = random.Random(0), engine
        self._bad: set[int] = set()
        self._row: Callable[..., Row] = engine._row
        engine._row = self._new_row  # type: ignore[method-assign]
        engine._model.register_forward_pre_hook(self._before)
        engine._model.model.layers[1].register_forward_hook(self._plant_nan)

    def _new_row(self, *arguments: Any) -> Row:
        row = self._row(*arguments)
        if self.on and self._source.random() < 1 / 20:
            self._bad.add(id(row))
        else:
            self._bad.discard(id(row))
        return row

    def _before(self, *_: object) -> None:
        if self.on and self._source.random() < 1 / 60:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        if self.on and self._source.random() < 1 / 200:
            raise RuntimeError("a step went wrong")

    def _plant_nan(self, _module: Any, _arguments: Any, output: torch.Tensor) -> None:
        begin = 0
        for each in self._engine._manager.processors.step:
            if id(each.state.logit_processor_kwargs["row"]) in self._bad:
                output[:, begin : begin + each.query_length] = math.nan
            begin += each.query_length


async def test_whatever_happens_a_finished_answer_is_the_one_it_is_alone_and_nothing_is_left(
    tmp_path: Path,
) -> None:
    tiny_chat_folder(tmp_path)
    save_mask(random_mask(AutoModelForCausalLM.from_pretrained(tmp_path)), tmp_path)
    first = Mask.load(tmp_path / "mask.safetensors")
    pair, seen = (first, scaled(first, 1.7)), Counter[str]()
    small = {"max_num_seqs": 8, "kv_cache_tokens": 2048, "max_model_len": 1024}
    async with serving(tmp_path, **small, max_failures=10**6) as engine:

        def granted(number: int) -> GenerateRequest:
            return replace(REQUESTS[number], mask_digest=engine.describe().mask_digest)

        alone = {}
        for mask in pair:
            await engine.use_mask(mask)
            for number in range(len(REQUESTS)):
                alone[number, mask.digest] = tokens(await collect(engine.generate(granted(number))))
        faults, end = Faults(engine), time.monotonic() + SECONDS

        def goes_on() -> bool:
            enough = seen["whole"] > 20 and seen["left"] and seen["swaps"] > 10
            return time.monotonic() < end or not enough

        async def client(source: random.Random) -> None:
            while goes_on():
                number = source.randrange(len(REQUESTS))
                request, got = granted(number), []
                outputs = engine.generate(request)
                num_wanted = source.choice([1, 5, 1000, 1000])
                try:
                    async for output in outputs:
                        got.append(output)
                        if len(got) == num_wanted:
                            break
                    seen["whole" if got[-1].finish_reason else "left"] += 1
                except (EngineUnavailableError, GenerationError) as error:
                    seen[type(error).__name__] += 1
                    await asyncio.sleep(0.01)
                finally:
                    await outputs.aclose()
                expected = alone[number, str(request.mask_digest)]
                assert tokens(got) == expected[: len(tokens(got))]
                assert not (got and got[-1].finish_reason) or tokens(got) == expected

        async def swaps() -> None:
            while goes_on():
                await engine.use_mask(pair[seen["swaps"] % 2])
                seen["swaps"] += 1
                await asyncio.sleep(0.05)

        faults.on = True
        clients = (client(random.Random(number)) for number in range(16))
        await asyncio.wait_for(asyncio.gather(swaps(), *clients), SECONDS + 120)
        faults.on = False
        await until(lambda: engine.healthy().ready and is_idle(engine))
        for number in range(len(REQUESTS)):
            request = granted(number)
            answer = tokens(await collect(engine.generate(request)))
            assert answer == alone[number, str(request.mask_digest)]
        processor = engine._manager.batch_processor
        assert not engine._open and not processor.scheduler.suspects
        assert not processor.cache.cache_allocators["full_attention"].block_table
