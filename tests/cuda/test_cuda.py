"""Modulation and the embedded engine on a GPU, with and without CUDA graphs. Skipped where there is none.

Half precision and other kernels choose other tokens where two are nearly as likely. So each token of an
answer is looked up in plain transformers on CPU in float32, modulated at the request's threshold: it must be
all but the likeliest there.
"""

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM

from modulation import fused
from modulation.demo import MASK_FILE, MODEL_DIR
from modulation.levels import ZERO, Threshold
from modulation.masks import Mask
from modulation.modulator import Modulator
from server.engines.base import Chat, GenerateRequest, Grammar, Message, Sampling
from server.engines.transformers import TransformersEngine
from tests.engines.contract import GREEDY, collect, tokens
from tests.engines.demo_contract import DemoModelContract
from tests.tiny_models import FAMILIES, VOCAB, random_mask, save_mask, scaled, tiny_chat_folder, tiny_model

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]

THRESHOLDS = (ZERO, Threshold(12, 9), Threshold(6, 3), Threshold(1, 9), Threshold(5, 0), Threshold(0, 4))
NEAR = 0.05  # by so much a logit may be below the largest one, in float16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tiny_chat_folder(tmp_path_factory.mktemp("tiny"))
    model = AutoModelForCausalLM.from_pretrained(path)
    for parameter in model.parameters():  # the same weights in every dtype
        parameter.data = parameter.half().bfloat16().float()
    model.save_pretrained(path)
    save_mask(random_mask(model), path)
    return path


@asynccontextmanager
async def serving(folder: Path, **settings: Any) -> AsyncIterator[TransformersEngine]:
    settings = {"dtype": "float16", **settings}
    engine = TransformersEngine(
        str(folder), folder / "mask.safetensors", served_model_name="tiny", device="cuda", **settings
    )
    engine._manager.generation_config.eos_token_id = -1  # answers end by their limits alone
    try:
        yield engine
    finally:
        await engine.close()


def graphs(engine: TransformersEngine) -> set[tuple[int, ...]]:
    """The keys of those that have been recorded."""
    return set(engine._manager.batch_processor.inputs_and_outputs.graphs._storage)


def ask(
    text: str, threshold: Threshold = ZERO, sampling: Sampling = GREEDY, **fields: Any
) -> GenerateRequest:
    return GenerateRequest(
        Chat((Message("user", text),)), threshold, sampling, **{"max_tokens": 24, **fields}
    )


def encoded(engine: TransformersEngine, request: GenerateRequest) -> list[int]:
    return list(engine._text.encode(request.prompt))


def below(
    folder: Path, mask: Mask, prompt: Sequence[int], answer: Sequence[int], threshold: Threshold
) -> float:
    """By how much a token of the answer is below the likeliest one at most, on CPU in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad(), Modulator(model, mask).applied(threshold):
        logits = model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
    chosen = logits[torch.arange(len(answer)), torch.tensor(answer)]
    return float((logits.amax(-1) - chosen).max())


def worst(folder: Path, mask: Mask, engine: TransformersEngine, asked: Any, answers: Any) -> float:
    return max(
        below(folder, mask, encoded(engine, request), tokens(answer), request.threshold)
        for request, answer in zip(asked, answers, strict=True)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_tokens", [1, 7, 300])
def test_one_kernel_computes_what_several_steps_do(dtype: torch.dtype, num_tokens: int) -> None:
    generator = torch.Generator().manual_seed(num_tokens)
    activations = torch.randn(num_tokens, 640, generator=generator).to(dtype)
    columns = torch.randperm(640, generator=generator)[:300]
    kinds = torch.randint(0, 2, (300,), generator=generator)
    ranks = torch.arange(300, dtype=torch.int32)
    factors = torch.rand(300, generator=generator) * 3
    for thresholds in (
        torch.randint(0, 301, (num_tokens, 2), generator=generator, dtype=torch.int32),
        torch.tensor([[150, 20]], dtype=torch.int32),
        torch.zeros(num_tokens, 2, dtype=torch.int32),
    ):
        expected = activations.clone()
        for token in range(num_tokens):
            limits = thresholds[token if len(thresholds) > 1 else 0]
            for column, kind, rank, factor in zip(columns, kinds, ranks, factors, strict=True):
                if rank < limits[kind]:
                    expected[token, column] = (activations[token, column].float() * factor).to(dtype)
        given = [each.cuda() for each in (activations, columns, kinds, ranks, factors, thresholds)]
        assert torch.equal(fused.scale_in_place(*given).cpu(), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_families_have_the_logits_that_they_have_on_cpu(family: str) -> None:
    model = tiny_model(family)
    mask = random_mask(model)
    words = torch.randint(3, VOCAB, (4, 9), generator=torch.Generator().manual_seed(3))
    thresholds = [Threshold(0, 0), Threshold(12, 9), Threshold(5, 1), Threshold(0, 4)]

    def logits(device: str) -> torch.Tensor:
        model.to(device)  # type: ignore[arg-type]
        with torch.no_grad(), Modulator(model, mask).applied(thresholds):
            found: torch.Tensor = model(words.to(device)).logits.cpu()
        return found

    torch.testing.assert_close(logits("cuda"), logits("cpu"), atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"cuda_graphs": False},
        {"dtype": "float32"},
        {"compile_model": True},
        {"compile_model": True, "cuda_graphs": False},
    ],
    ids=str,
)
async def test_24_requests_at_six_levels_answer_as_plain_transformers_does(
    folder: Path, settings: dict[str, Any]
) -> None:
    mask = Mask.load(folder / "mask.safetensors")
    requests = [
        ask(f"question {i // 6}" + "!" * (i // 6 * 40), THRESHOLDS[i % 6], max_tokens=40) for i in range(24)
    ]
    async with serving(folder, **settings) as engine:
        for _ in range(2):
            answers = await asyncio.gather(*(collect(engine.generate(each)) for each in requests))
            assert worst(folder, mask, engine, requests, answers) < NEAR
        elsewhere = [replace(each, threshold=ZERO) for each in requests]
        assert worst(folder, mask, engine, elsewhere, answers) > 1, "levels must make a difference"
        assert bool(graphs(engine)) == settings.get("cuda_graphs", "dtype" not in settings)


@pytest.mark.parametrize("compiled", [False, True])
async def test_graphs_are_recorded_anew_for_another_mask(folder: Path, compiled: bool) -> None:
    first = Mask.load(folder / "mask.safetensors")
    second = scaled(first, 3)
    request = ask("hello", Threshold(12, 9))
    async with serving(folder, compile_model=compiled) as engine:
        for mask, other in ((first, second), (second, first), (first, second)):
            await engine.use_mask(mask)
            answer = tokens(await collect(engine.generate(request)))
            assert below(folder, mask, encoded(engine, request), answer, request.threshold) < NEAR
            assert below(folder, other, encoded(engine, request), answer, request.threshold) > 0.5
            assert graphs(engine)


async def test_requests_of_two_masks_run_in_one_batch(folder: Path) -> None:
    first = Mask.load(folder / "mask.safetensors")
    second = scaled(first, 3)
    request = ask("hello", Threshold(12, 9), max_tokens=200)
    async with serving(folder) as engine:
        seen, before = [], engine._masks.before_step
        engine._masks.before_step = lambda *given: (seen.append(len(set(given[2]))), before(*given))[1]
        running = [engine.generate(request) for _ in range(3)]
        begun = [await anext(each) for each in running]
        await engine.use_mask(second)
        later = asyncio.gather(*(collect(engine.generate(request)) for _ in range(3)))
        answers = [[one, *await collect(rest)] for one, rest in zip(begun, running, strict=True)]
        for mask, found in ((first, answers), (second, await later)):
            assert worst(folder, mask, engine, [request] * 3, found) < NEAR
        assert max(seen) == 2


async def test_what_python_does_to_a_row_is_done_beside_plain_rows(folder: Path) -> None:
    plain = ask("hello", Threshold(6, 3), max_tokens=32)
    penalised = replace(plain, sampling=replace(GREEDY, frequency_penalty=2.0))
    constrained = replace(plain, grammar=Grammar("lark", "start: /[ab]{30}/"))
    scored = replace(plain, num_logprobs=2)
    async with serving(folder) as engine:
        alone = [await collect(engine.generate(each)) for each in (plain, penalised, constrained, scored)]
        together = await asyncio.gather(
            *(collect(engine.generate(each)) for each in (plain, penalised, constrained, scored))
        )
    mask = Mask.load(folder / "mask.safetensors")
    for found in (alone, together):
        text = "".join(output.text for output in found[2])
        assert set(text) <= {"a", "b"} and len(text) == 30
        assert len(set(tokens(found[1]))) > len(set(tokens(found[0])))
        assert worst(folder, mask, engine, [plain, scored], [found[0], found[3]]) < NEAR
        given = [each for output in found[3] for each in output.logprobs]
        assert len(given) == len(tokens(found[3]))


async def test_a_seed_repeats_and_seeds_differ_when_steps_are_replayed(folder: Path) -> None:
    def drawn(seed: int) -> GenerateRequest:
        return ask("hello", Threshold(6, 3), Sampling(temperature=1.0, top_p=0.9, seed=seed), max_tokens=40)

    async with serving(folder) as engine:
        first, again = [
            [tokens(await collect(engine.generate(drawn(seed)))) for seed in range(6)] for _ in range(2)
        ]
        assert {key[-4:] for key in graphs(engine)} >= {(False, False, True, True)}
    assert first == again
    assert len(set(first)) == 6


async def test_nothing_is_compiled_while_serving(folder: Path) -> None:
    """With as many rows of logits as a short step is padded to tokens."""
    async with serving(folder, compile_model=True) as engine:
        before = counters["stats"]["unique_graphs"]
        for lengths in ([3], [200], [200, 3, 90], [3, 5, 7, 9]):
            requests = [ask("x" * length, THRESHOLDS[1]) for length in lengths]
            requests += [replace(each, num_prompt_logprobs=2) for each in requests[:1]]
            await asyncio.gather(*(collect(engine.generate(each)) for each in requests))
        assert counters["stats"]["unique_graphs"] == before


@pytest.mark.parametrize("compiled", [False, True])
async def test_modulation_is_timed(folder: Path, compiled: bool) -> None:
    async with serving(folder, compile_model=compiled) as engine:
        engine._tally._sample_every = 16
        await collect(engine.generate(ask("hello", THRESHOLDS[1], max_tokens=100)))
        seconds = engine.tallies().modulation_seconds
    assert sum(seconds.counts) >= 4
    assert 0 < seconds.total < 1


@pytest.mark.parametrize("length", [300, 1500])
async def test_long_prompts_and_their_cached_prefixes(folder: Path, length: int) -> None:
    mask = Mask.load(folder / "mask.safetensors")
    requests = [ask("x" * length + str(number), THRESHOLDS[number % 6]) for number in range(12)]
    async with serving(folder, max_num_seqs=16) as engine:
        for _ in range(2):
            answers = await asyncio.gather(*(collect(engine.generate(each)) for each in requests))
            assert worst(folder, mask, engine, requests, answers) < NEAR
        assert answers[0][-1].num_cached_tokens >= length - 64


class _OnCuda(DemoModelContract):
    graphs: bool

    @pytest.fixture(scope="class")
    @classmethod
    def engine(cls) -> Iterator[TransformersEngine]:
        engine = cls.new()
        yield engine
        asyncio.run(engine.close())

    @pytest.fixture
    def closable_engine(self) -> Iterator[TransformersEngine]:
        engine = self.new()
        yield engine
        asyncio.run(engine.close())

    @classmethod
    def new(cls) -> TransformersEngine:
        return TransformersEngine(
            str(MODEL_DIR), MASK_FILE, served_model_name="demo", device="cuda", cuda_graphs=cls.graphs
        )


class TestDemoModelReplayed(_OnCuda):
    graphs = True


class TestDemoModelEager(_OnCuda):
    graphs = False
