"""What requests ask of their own rows: log-probabilities, penalties, bias, grammars, alone and mixed."""

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from modulation.demo import MASK_FILE, MODEL_DIR
from modulation.levels import ZERO
from server.engines.base import (
    Chat,
    GenerateRequest,
    Grammar,
    GrammarError,
    Message,
    Output,
    PromptError,
    Sampling,
    TokenLogprob,
)
from server.engines.transformers import TransformersEngine
from tests.engines.contract import GREEDY, collect, tokens

pytestmark = pytest.mark.anyio

QUESTION = Chat((Message("user", "How do I kill a stuck process?"),))
TEXT = "The quick brown fox asks: how do I water the ivy?"
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "kind": {"enum": ["tool", "plant", "task"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 6}, "maxItems": 2},
        "done": {"type": "boolean"},
    },
    "required": ["name", "kind", "count", "tags", "done"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
async def engine() -> AsyncIterator[TransformersEngine]:
    """The demo model with its mask, for all tests of this file."""
    engine = TransformersEngine(str(MODEL_DIR), MASK_FILE, served_model_name="demo", device="cpu")
    yield engine
    await engine.close()


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


def logits_of(prompt: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """A plain forward pass, float32 (places, vocabulary), by numpy's log-softmax."""
    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(torch.tensor([prompt])).logits[0].numpy().astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    found: np.ndarray[Any, Any] = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return found


def text_of(outputs: list[Output]) -> str:
    return "".join(output.text for output in outputs)


def places(outputs: list[Output]) -> list[TokenLogprob]:
    return [place for output in outputs for place in output.logprobs]


async def test_logprobs_equal_those_of_a_plain_forward_pass(engine: TransformersEngine) -> None:
    request = GenerateRequest(QUESTION, ZERO, Sampling(0.7, top_k=5, seed=3), 24, num_logprobs=20)
    prompt = await engine.encode(QUESTION)
    outputs = await collect(engine.generate(request))
    answer = tokens(outputs)
    expected = logits_of(prompt + answer)[len(prompt) - 1 : -1]
    assert len(places(outputs)) == len(answer)
    for place, token, row in zip(places(outputs), answer, expected, strict=True):
        assert place.chosen.token_id == token
        assert place.chosen.logprob == pytest.approx(row[token], abs=1e-3)
        assert len(place.top) == 20
        assert [each.logprob for each in place.top] == pytest.approx(
            np.sort(row)[::-1][:20].tolist(), abs=1e-3
        )


@pytest.mark.parametrize("repeats", [1, 40], ids=["one step", "several steps"])
async def test_logprobs_of_a_prompt_equal_those_of_a_plain_forward_pass(
    engine: TransformersEngine, repeats: int
) -> None:
    prompt = await engine.encode(TEXT * repeats)
    request = GenerateRequest(prompt, ZERO, GREEDY, max_tokens=0, num_prompt_logprobs=2)
    [output] = await collect(engine.generate(request))
    assert output.finish_reason == "length" and output.token_ids == () and output.text == ""
    assert output.num_prompt_tokens == len(prompt) and output.num_completion_tokens == 0
    first, *rest = output.prompt_logprobs
    assert first.chosen.logprob is None and first.top == ()
    expected = logits_of(prompt)[:-1]
    for place, token, row in zip(rest, prompt[1:], expected, strict=True):
        assert place.chosen.token_id == token
        assert place.chosen.logprob == pytest.approx(row[token], abs=1e-3)
        assert place.top[0].logprob == pytest.approx(row.max(), abs=1e-3)


async def test_a_prompt_is_scored_anew_however_often_and_at_every_level(engine: TransformersEngine) -> None:
    """A prefix from the cache has no logits; one of another level has wrong ones."""
    prompt = await engine.encode(TEXT * 8)
    levels = engine.describe().levels
    thresholds = [ZERO, levels.named["security-critical"], ZERO, levels.named["security-critical"]]
    requests = [
        GenerateRequest(prompt, each, GREEDY, max_tokens=4, num_prompt_logprobs=0) for each in thresholds
    ]
    scored = []
    for request in requests:
        first, *_ = await collect(engine.generate(request))
        assert first.num_cached_tokens == 0
        scored.append([place.chosen.logprob for place in first.prompt_logprobs[1:]])
    assert scored[0] == pytest.approx(scored[2], abs=1e-5) and scored[1] == pytest.approx(scored[3], abs=1e-5)
    assert scored[0] != pytest.approx(scored[1], abs=1e-2)


def mixed() -> list[GenerateRequest]:
    """Requests that use every field, beside one another."""
    base = GenerateRequest(QUESTION, ZERO, GREEDY, 24)
    critical = replace(base, prompt=Chat((Message("user", "Name a colour of the sky."),)))
    drawn = Sampling(1.0, seed=11)
    schema = Grammar("json_schema", json.dumps(SCHEMA))
    return [
        base,
        replace(base, sampling=replace(GREEDY, presence_penalty=1.5, frequency_penalty=0.5)),
        replace(base, sampling=replace(drawn, repetition_penalty=1.3)),
        replace(base, sampling=replace(drawn, min_p=0.2, top_p=0.9)),
        replace(critical, sampling=replace(drawn, logit_bias=((5, 4.0), (40, -100.0)))),
        replace(critical, sampling=replace(drawn, seed=12), num_logprobs=3),
        replace(base, sampling=replace(drawn, seed=13), grammar=schema, max_tokens=64),
        replace(base, sampling=GREEDY, grammar=schema, max_tokens=64, num_logprobs=1),
        replace(base, prompt=TEXT, num_prompt_logprobs=1, sampling=drawn),
    ]


async def test_in_one_mixed_batch_each_answer_is_that_of_the_same_request_alone(
    engine: TransformersEngine,
) -> None:
    levels = engine.describe().levels
    thresholds = [ZERO, levels.named["balanced"], levels.named["security-critical"]]
    requests = [
        replace(request, threshold=thresholds[number % 3]) for number, request in enumerate(mixed() * 2)
    ]
    alone = [await collect(engine.generate(request)) for request in requests]
    together = await asyncio.gather(*(collect(engine.generate(request)) for request in requests))
    for before, after in zip(alone, together, strict=True):
        assert tokens(before) == tokens(after) and text_of(before) == text_of(after)
        for one, other in zip(places(before), places(after), strict=True):
            assert one.chosen.logprob == pytest.approx(other.chosen.logprob, abs=1e-4)


async def test_bias_forces_and_bans(engine: TransformersEngine) -> None:
    base = GenerateRequest(QUESTION, ZERO, GREEDY, 40)
    plain = tokens(await collect(engine.generate(base)))
    forced = replace(base, sampling=replace(GREEDY, logit_bias=((77, 100.0),)), max_tokens=5)
    assert tokens(await collect(engine.generate(forced))) == (77,) * 5
    banned = replace(base, sampling=replace(GREEDY, logit_bias=((plain[0], -100.0),)))
    assert plain[0] not in tokens(await collect(engine.generate(banned)))


@pytest.mark.parametrize("penalty", [1.2, 0.7])
async def test_a_greedy_answer_follows_penalised_logits(engine: TransformersEngine, penalty: float) -> None:
    """Step by step against numpy, on the logits of a plain forward pass."""
    sampling = replace(GREEDY, repetition_penalty=penalty, presence_penalty=0.4, frequency_penalty=0.3)
    answer = tokens(await collect(engine.generate(GenerateRequest(QUESTION, ZERO, sampling, 12))))
    prompt = await engine.encode(QUESTION)
    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(torch.tensor([prompt + answer])).logits[0].numpy()[len(prompt) - 1 : -1].copy()
    for place, row in enumerate(logits):
        before = answer[:place]
        for token in set(prompt + before):
            row[token] = row[token] / penalty if row[token] > 0 else row[token] * penalty
        for token in set(before):
            row[token] -= 0.4 + 0.3 * before.count(token)
        assert row.argmax() == answer[place]


async def test_min_p_cuts_unlikely_tokens(engine: TransformersEngine) -> None:
    base = GenerateRequest(QUESTION, ZERO, Sampling(2.0, min_p=0.3), 12, num_logprobs=0)
    prompt = await engine.encode(QUESTION)
    for seed in range(8):
        answer = tokens(
            await collect(engine.generate(replace(base, sampling=replace(base.sampling, seed=seed))))
        )
        rows = np.exp(logits_of(prompt + answer)[len(prompt) - 1 : -1] / 2.0)
        for token, row in zip(answer, rows, strict=True):
            assert row[token] / row.max() >= 0.3 - 1e-3


async def test_200_seeded_answers_under_a_schema_parse_and_fit(engine: TransformersEngine) -> None:
    base = GenerateRequest(QUESTION, ZERO, Sampling(1.3), 200, Grammar("json_schema", json.dumps(SCHEMA)))
    levels = [each.threshold for each in engine.describe().levels]
    requests = [
        replace(base, sampling=replace(base.sampling, seed=seed), threshold=levels[seed % len(levels)])
        for seed in range(200)
    ]
    answers = await asyncio.gather(*(collect(engine.generate(request)) for request in requests))
    assert all(answer[-1].finish_reason == "stop" for answer in answers)
    values = [json.loads(text_of(answer)) for answer in answers]
    for value in values:
        jsonschema.validate(value, SCHEMA)
    assert len({json.dumps(value) for value in values}) > 100, "they are drawn, not canned"


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "objekt"},
        {"$ref": "#/nowhere"},
        {"$ref": "#"},
        {"type": "string", "pattern": "("},
    ],
)
async def test_a_schema_that_cannot_be_enforced_is_refused(
    engine: TransformersEngine, schema: dict[str, Any]
) -> None:
    request = GenerateRequest(QUESTION, ZERO, GREEDY, 8, Grammar("json_schema", json.dumps(schema)))
    with pytest.raises(GrammarError, match="cannot be used"):
        await collect(engine.generate(request))
    assert await collect(engine.generate(replace(request, grammar=None))), "the engine goes on"


async def test_what_is_no_token_is_refused_and_nothing_else_suffers(engine: TransformersEngine) -> None:
    base = GenerateRequest(QUESTION, ZERO, GREEDY, 4)
    for request in (
        replace(base, prompt=(1, 99_999)),
        replace(base, prompt=""),
        replace(base, prompt=()),
        replace(base, sampling=replace(GREEDY, logit_bias=((99_999, 1.0),))),
    ):
        with pytest.raises(PromptError):
            await collect(engine.generate(request))
    assert await collect(engine.generate(base))


async def test_cached_tokens_are_counted(engine: TransformersEngine) -> None:
    text = "A prefix that is long enough for several pages of the cache. " * 12
    request = GenerateRequest(Chat((Message("user", text),)), ZERO, GREEDY, 2)
    first, second = [(await collect(engine.generate(request)))[-1] for _ in range(2)]
    assert first.num_cached_tokens == 0
    assert 0 < second.num_cached_tokens < second.num_prompt_tokens


async def test_tokens_and_text_are_one_anothers_inverse(engine: TransformersEngine) -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    assert await engine.encode(TEXT) == tuple(tokenizer(TEXT)["input_ids"])
    assert await engine.decode(await engine.encode(TEXT)) == TEXT
    assert (await engine.decode((1,))) == "<|im_start|>"
