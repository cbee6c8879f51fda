"""The gateway engine keeps the contract as far as another server lets it; else it fails closed."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from modulation.errors import MaskError, MaskMismatchError, ModelError, UnsafeMaskError
from modulation.levels import ZERO, Threshold
from modulation.masks import Mask
from server.engines.base import (
    Chat,
    Engine,
    EngineBusyError,
    EngineError,
    EngineUnavailableError,
    GenerateRequest,
    GenerationError,
    Grammar,
    Message,
    PromptError,
    PromptTooLongError,
    Sampling,
    ToolCall,
    UnsupportedByEngineError,
)
from server.engines.fake import FakeEngine
from server.engines.upstream import UpstreamEngine
from tests.engines.contract import GREEDY, EngineContract, collect, is_idle, tokens, until
from tests.gateway.standin import Standin, standing
from tests.tiny_models import random_mask, save_mask, tiny_model

MASK = random_mask(tiny_model())
LEVELS = {level.name: level.threshold for level in MASK.levels}


def standin(engine: FakeEngine | None = None, **wrong: Any) -> Standin:
    """An upstream with an adapter for each level of the mask."""
    models = {("demo" if name == "off" else f"demo-{name}"): each for name, each in LEVELS.items()}
    return Standin(engine or FakeEngine(), models, **wrong)


@asynccontextmanager
async def gateway(upstream: Standin, mask: Path, **settings: Any) -> AsyncIterator[UpstreamEngine]:
    """The engine in front of `upstream`. It is made on another thread: its constructor waits for answers."""
    async with standing(upstream) as url:
        engine = await made(url, mask, **settings)
        upstream.asked.clear()
        try:
            yield engine
        finally:
            await engine.close()
            if isinstance(upstream.engine, FakeEngine):
                await upstream.engine.close()


async def made(url: str, mask: Path, **settings: Any) -> UpstreamEngine:
    named = {"served_model_name": "served", "upstream_model": "demo", **settings}
    return await asyncio.to_thread(UpstreamEngine, url, mask, **named)


@pytest.fixture
def mask_file(tmp_path: Path) -> Path:
    return save_mask(MASK, tmp_path)


class TestUpstreamEngine(EngineContract):
    """Numbers and swaps are refused, which tests of its own say instead."""

    @pytest.fixture
    async def engine(self, mask_file: Path) -> AsyncIterator[UpstreamEngine]:
        async with gateway(standin(), mask_file) as engine:
            yield engine

    @pytest.fixture
    async def closable_engine(self, mask_file: Path) -> AsyncIterator[UpstreamEngine]:
        async with gateway(standin(), mask_file) as engine:
            yield engine

    def thresholds(self, engine: Engine) -> list[Threshold]:
        return [level.threshold for level in engine.describe().levels]

    def masks(self) -> list[Mask]:
        return [random_mask(tiny_model(), seed) for seed in range(3)]

    def misfit(self) -> Mask:
        return random_mask(tiny_model(), model_id="another")

    async def test_tallies_count_what_ran_and_how_full_it_is(self, closable_engine: Engine) -> None:
        """Steps are the upstream's, and so are their counts."""
        assert await collect(closable_engine.generate(self.long_answer))
        assert closable_engine.tallies() is None

    async def test_a_step_has_as_many_levels_as_the_requests_in_it(self, closable_engine: Engine) -> None:
        """Nor is this known here."""
        assert closable_engine.tallies() is None

    async def test_queued_seconds_are_known_with_the_first_output_and_stay(self, engine: Engine) -> None:
        """No upstream tells them, so they stay 0."""
        outputs = await collect(engine.generate(self.long_answer))
        assert {output.queued_seconds for output in outputs} == {0}

    async def test_a_swap_waits_for_nobody_and_what_runs_ends_under_the_mask_it_began_with(
        self, closable_engine: Engine
    ) -> None:
        """Another mask has other adapters, so it is refused, and what runs goes on."""
        info, running = closable_engine.describe(), closable_engine.generate(self.long_answer)
        begun = await anext(running)
        with pytest.raises(MaskMismatchError, match=f"made from the mask {info.mask_digest}"):
            await closable_engine.use_mask(self.masks()[1])
        assert closable_engine.describe() == info
        assert begun.token_ids + tokens(await collect(running)) == tokens(
            await collect(closable_engine.generate(self.long_answer))
        )

    async def test_a_request_granted_under_the_mask_before_still_gets_it(
        self, closable_engine: Engine
    ) -> None:
        """There is none before: what was granted under another mask than this one is refused."""
        granted = replace(self.long_answer, mask_digest=closable_engine.describe().mask_digest)
        assert await collect(closable_engine.generate(granted))
        with pytest.raises(EngineUnavailableError, match="is not in force here"):
            await collect(closable_engine.generate(replace(granted, mask_digest="0" * 64)))

    async def test_the_mask_in_force_again_is_no_swap(self, closable_engine: Engine) -> None:
        info = closable_engine.describe()
        assert await closable_engine.use_mask(self.masks()[0]) == info


pytestmark = pytest.mark.anyio

HELLO = GenerateRequest(Chat((Message("user", "Hello"),)), ZERO, GREEDY)


async def test_each_level_is_its_adapter_on_the_wire_and_off_the_base(mask_file: Path) -> None:
    upstream = standin()
    async with gateway(upstream, mask_file) as engine:
        for name, threshold in LEVELS.items():
            await collect(engine.generate(replace(HELLO, threshold=threshold)))
            assert upstream.asked[-1]["model"] == ("demo" if name == "off" else f"demo-{name}")


async def test_adapters_may_have_names_of_their_own(mask_file: Path) -> None:
    upstream = standin()
    upstream.models = {"org/base": ZERO, "safe": LEVELS["security-critical"]}
    upstream.models |= {f"base-{name}": each for name, each in LEVELS.items() if name != "off"}
    adapters = {"security-critical": "safe"}
    async with gateway(upstream, mask_file, upstream_model="org/base", adapters=adapters) as engine:
        for threshold, model in ((ZERO, "org/base"), (LEVELS["security-critical"], "safe")):
            await collect(engine.generate(replace(HELLO, threshold=threshold)))
            assert upstream.asked[-1]["model"] == model
        await collect(engine.generate(replace(HELLO, threshold=LEVELS["balanced"])))
        assert upstream.asked[-1]["model"] == "base-balanced"


async def test_a_number_that_is_no_level_is_refused_with_the_reason_and_never_asked(mask_file: Path) -> None:
    upstream = standin()
    async with gateway(upstream, mask_file) as engine:
        with pytest.raises(UnsupportedByEngineError, match="one adapter for each of those and none for"):
            await collect(engine.generate(replace(HELLO, threshold=Threshold(3, 2))))
        assert not upstream.asked and is_idle(engine)


async def test_every_field_of_sampling_is_passed_on(mask_file: Path) -> None:
    upstream = standin()
    sampling = Sampling(0.7, 5, 0.9, 11, 0.05, 1.1, 0.2, 0.3, ((3, -1.5),))
    async with gateway(upstream, mask_file) as engine:
        salted = replace(HELLO, cache_salt="mine")
        await collect(engine.generate(replace(salted, sampling=sampling, max_tokens=9, num_logprobs=2)))
        asked = upstream.asked[-1]
        told = {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "seed": 11, "min_p": 0.05, "max_tokens": 9}
        told |= {"repetition_penalty": 1.1, "presence_penalty": 0.2, "frequency_penalty": 0.3}
        told |= {"logit_bias": {"3": -1.5}, "logprobs": True, "top_logprobs": 3, "stream": True}
        told |= {"cache_salt": "mine"}
        assert {name: asked[name] for name in told} == told
        await collect(engine.generate(replace(HELLO, sampling=Sampling())))
        asked = upstream.asked[-1]
        assert (asked["top_k"], asked["min_p"], asked["repetition_penalty"]) == (-1, 0.0, 1.0)
        assert not {"seed", "logit_bias", "max_tokens", "logprobs", "cache_salt"} & asked.keys()


async def test_the_same_outputs_come_through_as_the_engine_behind_gives(mask_file: Path) -> None:
    behind = FakeEngine()
    wanted = [
        replace(HELLO, threshold=LEVELS["balanced"], num_logprobs=3),
        GenerateRequest("a text as it stands", ZERO, GREEDY, max_tokens=20, num_logprobs=2),
        GenerateRequest((3, 4, 5), ZERO, Sampling(seed=5), max_tokens=20),
    ]
    async with gateway(standin(behind), mask_file) as engine:
        for request in wanted:
            direct, through = await collect(behind.generate(request)), await collect(engine.generate(request))
            assert [each.text for each in through] == [each.text for each in direct]
            assert tokens(through) == tokens(direct) and through[-1].finish_reason == direct[-1].finish_reason
            ends = [
                (each.num_prompt_tokens, each.num_completion_tokens) for each in (through[-1], direct[-1])
            ]
            assert ends[0] == ends[1]
            for one, other in zip(through, direct, strict=True):
                assert [_numbers(each) for each in one.logprobs] == [
                    _numbers(each) for each in other.logprobs
                ]


def _numbers(place: Any) -> Any:
    return (place.chosen.utf8, place.chosen.logprob, {each.utf8: each.logprob for each in place.top})


async def test_log_probabilities_of_a_prompt_come_through(mask_file: Path) -> None:
    behind = FakeEngine()
    async with gateway(standin(behind), mask_file) as engine:
        for prompt in ("a text as it stands", (3, 4, 5)):
            for max_tokens in (0, 4):
                request = GenerateRequest(
                    prompt, ZERO, GREEDY, max_tokens=max_tokens, num_logprobs=2, num_prompt_logprobs=2
                )
                direct, (through,) = (
                    await collect(behind.generate(request)),
                    await collect(engine.generate(request)),
                )
                expected = [place for each in direct for place in each.prompt_logprobs]
                assert [place.chosen.logprob for place in through.prompt_logprobs] == [
                    place.chosen.logprob for place in expected
                ]
                assert through.text == "".join(each.text for each in direct)
                assert through.num_completion_tokens == max_tokens == len(through.logprobs)


async def test_tokens_are_asked_of_the_upstream(mask_file: Path) -> None:
    behind = FakeEngine()
    async with gateway(standin(behind), mask_file) as engine:
        for prompt in (HELLO.prompt, "some words here", (3, 4, 5)):
            assert await engine.encode(prompt) == await behind.encode(prompt)
        assert await engine.decode((3, 4, 5)) == await behind.decode((3, 4, 5))
        assert await engine.spell((3, 3, 5)) == await behind.spell((3, 3, 5))
        with pytest.raises(PromptError, match="is no token"):
            await engine.decode((99999,))
        with pytest.raises(UnsupportedByEngineError, match="at most 1024"):
            await engine.spell(tuple(range(2000)))
        with pytest.raises(PromptError):
            await engine.encode("")


async def test_a_completion_without_a_limit_gets_the_room_that_is_left(mask_file: Path) -> None:
    upstream = standin(FakeEngine(max_model_len=40))
    async with gateway(upstream, mask_file) as engine:
        outputs = await collect(engine.generate(GenerateRequest("one two three", ZERO, GREEDY)))
        assert upstream.asked[-1]["max_tokens"] == 37 and outputs[-1].num_prompt_tokens == 3
        (counted,) = await collect(engine.generate(GenerateRequest("one two three", ZERO, max_tokens=0)))
        assert (counted.num_prompt_tokens, counted.finish_reason) == (3, "length")
        with pytest.raises(PromptTooLongError, match="40"):
            await collect(engine.generate(GenerateRequest("one " * 40, ZERO)))


async def test_an_upstream_that_tells_no_token_numbers_is_counted_at_the_end(mask_file: Path) -> None:
    behind = FakeEngine()
    async with gateway(standin(behind, tells_tokens=False), mask_file) as engine:
        direct, through = await collect(behind.generate(HELLO)), await collect(engine.generate(HELLO))
        assert "".join(each.text for each in through) == "".join(each.text for each in direct)
        last, expected = through[-1], direct[-1]
        assert last.num_completion_tokens == expected.num_completion_tokens == len(tokens(through))
        assert last.num_prompt_tokens == expected.num_prompt_tokens
        totals = [each.num_completion_tokens for each in through]
        assert totals == sorted(totals) and totals[0] > 0


def event(**fields: Any) -> bytes:
    return b"data: " + json.dumps({"model": "demo", **fields}, ensure_ascii=False).encode() + b"\n\n"


def said(finish: str | None = None, **delta: Any) -> bytes:
    return event(choices=[{"index": 0, "delta": delta, "finish_reason": finish}])


DONE = b"data: [DONE]\n\n"
USAGE = event(choices=[], usage={"prompt_tokens": 4, "completion_tokens": 7})
TOOL = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}}}
ASKED_WITH_TOOL = replace(HELLO, prompt=Chat((Message("user", "Hello"),), (TOOL,)))


async def test_calls_of_tools_come_from_the_upstream_in_pieces_and_as_calls(mask_file: Path) -> None:
    first = {"index": 0, "id": "a", "function": {"name": "look_up", "arguments": '{"of'}}
    rest = {"index": 0, "function": {"arguments": '": "</tool_call>"}'}}
    second = {"index": 1, "id": "b", "function": {"name": "look_up", "arguments": "{}"}}
    cut_short = {"index": 2, "id": "c", "function": {"name": "look_up", "arguments": '{"of": '}}
    raw = [
        said(role="assistant", content="Let me see."),
        said(tool_calls=[first]),
        said(tool_calls=[rest]),
        said("tool_calls", tool_calls=[second, cut_short]),
        USAGE,
        DONE,
    ]
    upstream = standin()
    async with gateway(upstream, mask_file) as engine:
        upstream.raw = raw
        outputs = await collect(engine.generate(ASKED_WITH_TOOL))
        assert upstream.asked[-1]["tools"] == [TOOL] and "tool_choice" not in upstream.asked[-1]
        text = "".join(each.text for each in outputs)
        parsed = engine.parse(text, ASKED_WITH_TOOL.prompt)
        assert parsed.content == 'Let me see.{"name": "look_up", "arguments": {"of": }'
        assert parsed.tool_calls == (
            ToolCall("look_up", '{"of": "</tool_call>"}'),
            ToolCall("look_up", "{}"),
        )
        assert outputs[-1].finish_reason == "stop" and outputs[-1].num_completion_tokens == 7
        assert text.index(engine.tool_marker) == len("Let me see.")
        cut = engine.parse(text[:-9], ASKED_WITH_TOOL.prompt)
        assert (cut.content, cut.tool_calls) == ("Let me see.", ())


@pytest.mark.parametrize(
    ("name", "several", "expected"),
    [
        (None, True, {"tool_choice": "required"}),
        (None, False, {"tool_choice": "required", "parallel_tool_calls": False}),
        (
            "look_up",
            False,
            {
                "tool_choice": {"type": "function", "function": {"name": "look_up"}},
                "parallel_tool_calls": False,
            },
        ),
    ],
)
async def test_a_call_that_must_be_made_is_asked_for_in_openais_words(
    mask_file: Path, name: str | None, several: bool, expected: dict[str, Any]
) -> None:
    upstream = standin()
    async with gateway(upstream, mask_file) as engine:
        upstream.raw = [said("stop", content="x"), USAGE, DONE]
        assert isinstance(ASKED_WITH_TOOL.prompt, Chat)
        grammar = engine.tool_grammar(ASKED_WITH_TOOL.prompt, name, several)
        await collect(engine.generate(replace(ASKED_WITH_TOOL, grammar=grammar)))
        asked = upstream.asked[-1]
        named = ("tool_choice", "parallel_tool_calls")
        assert {each: asked[each] for each in named if each in asked} == expected
        assert asked["tools"][0]["function"]["strict"] is True
        with pytest.raises(UnsupportedByEngineError, match="no tool 'other'; accepted: look_up"):
            engine.tool_grammar(ASKED_WITH_TOOL.prompt, "other", several)


async def test_a_json_schema_is_passed_on_and_another_grammar_refused(mask_file: Path) -> None:
    upstream = standin()
    async with gateway(upstream, mask_file) as engine:
        upstream.raw = [said("stop", content="{}"), USAGE, DONE]
        await collect(engine.generate(replace(HELLO, grammar=Grammar("json_schema", '{"type": "object"}'))))
        asked = upstream.asked[-1]["response_format"]
        assert asked["type"] == "json_schema" and asked["json_schema"]["schema"] == {"type": "object"}
        with pytest.raises(UnsupportedByEngineError, match="no other grammar"):
            await collect(engine.generate(replace(HELLO, grammar=Grammar("lark", "start: /a/"))))


async def test_line_breaks_inside_of_text_are_no_ends_of_events(mask_file: Path) -> None:
    """JSON may hold U+2028 and U+0085 as they are; a reader of text lines breaks there and loses events."""
    text = "a\u2028b\u0085c\x0bd"
    upstream = standin()
    async with gateway(upstream, mask_file) as engine:
        whole = said(content=text) + said("stop", content="") + USAGE + DONE
        upstream.raw = [whole[at : at + 5] for at in range(0, len(whole), 5)]
        assert "".join(each.text for each in await collect(engine.generate(HELLO))) == text


@pytest.mark.parametrize(
    ("raw", "kind", "words"),
    [
        (
            [said(content="a"), event(error={"message": "it broke", "code": 500}), DONE],
            GenerationError,
            "it broke",
        ),
        (
            [said(role="assistant", content=""), event(error={"message": "bad bias", "code": 400}), DONE],
            PromptError,
            "bad bias",
        ),
        (
            [said(content="a"), event(error={"message": "bad bias", "code": 400}), DONE],
            GenerationError,
            "could not go on",
        ),
        ([said(content="a"), DONE], EngineUnavailableError, "without saying why"),
        ([], EngineUnavailableError, "without saying why"),
        ([said("abort", content="a"), DONE], GenerationError, "'abort'"),
        ([b"data: {nonsense\n\n"], GenerationError, "not JSON"),
        ([b"data: []\n\n"], GenerationError, "not an object"),
        ([b'data: {"choices": [1]}\n\n'], GenerationError, "cannot be read"),
        ([said(reasoning="hm")], GenerationError, "without a reasoning parser"),
        ([said(reasoning_content="hm")], GenerationError, "without a reasoning parser"),
        ([event(model="other", choices=[])], GenerationError, "'other' where 'demo' was asked"),
    ],
)
async def test_an_answer_that_cannot_be_trusted_fails_and_says_why(
    mask_file: Path, raw: list[bytes], kind: type[EngineError], words: str
) -> None:
    upstream = standin()
    async with gateway(upstream, mask_file) as engine:
        upstream.raw = raw
        with pytest.raises(kind, match=words):
            await collect(engine.generate(HELLO))
        assert is_idle(engine)


VLLM_TOO_LONG = (
    "This model's maximum context length is 512 tokens. However, you requested 600 output tokens and your "
    "prompt contains 5 input tokens."
)


@pytest.mark.parametrize(
    ("status", "error", "headers", "kind", "words"),
    [
        (400, {"error": {"message": VLLM_TOO_LONG}}, {}, PromptTooLongError, "512"),
        (400, {"error": {"message": "bad bias", "param": "logit_bias"}}, {}, PromptError, "bad bias"),
        (400, {"message": "of an old vLLM"}, {}, PromptError, "of an old vLLM"),
        (422, {"detail": "a field"}, {}, PromptError, "a field"),
        (400, [], {}, PromptError, "."),
        (401, {}, {}, EngineUnavailableError, "refuses this server's key"),
        (403, {}, {}, EngineUnavailableError, "refuses this server's key"),
        (404, {}, {}, EngineUnavailableError, "does not know the adapter"),
        (429, {}, {"retry-after": "7"}, EngineBusyError, "no room"),
        (
            500,
            {"error": {"message": "secret path"}},
            {},
            GenerationError,
            r"failed on this request \(status 500\)",
        ),
        (503, {}, {"retry-after": "9"}, EngineUnavailableError, "status 503"),
        (504, {}, {}, EngineUnavailableError, "status 504"),
        (307, {}, {"location": "http://elsewhere.example/"}, EngineUnavailableError, "status 307"),
    ],
)
async def test_a_status_is_the_callers_mistake_only_where_it_is_theirs(
    mask_file: Path, status: int, error: Any, headers: dict[str, str], kind: type[EngineError], words: str
) -> None:
    upstream = standin()
    async with gateway(upstream, mask_file) as engine:
        upstream.status, upstream.error, upstream.headers = status, error, headers
        with pytest.raises(kind, match=words) as raised:
            await collect(engine.generate(HELLO))
        assert type(raised.value) is kind and "secret" not in str(raised.value)
        if isinstance(raised.value, EngineUnavailableError) and headers.get("retry-after"):
            assert raised.value.retry_after_seconds == int(headers["retry-after"])
        if isinstance(raised.value, PromptError) and "param" in str(error):
            assert raised.value.param == "logit_bias"
        assert is_idle(engine)


async def test_closing_the_iterator_closes_the_upstreams_stream(mask_file: Path) -> None:
    gate = asyncio.Event()

    async def wait(_: GenerateRequest, index: int) -> None:
        if index == 3 and armed:
            await gate.wait()

    armed: list[bool] = []
    behind = FakeEngine(before_token=wait)
    upstream = standin(behind)
    async with gateway(upstream, mask_file) as engine:
        armed.append(True)
        outputs = engine.generate(HELLO)
        await anext(outputs)
        await outputs.aclose()
        await asyncio.wait_for(upstream.left.wait(), 10)
        await until(lambda: is_idle(behind))
        assert upstream.num_left == 1 and is_idle(engine)


async def test_an_upstream_that_says_nothing_for_too_long_is_given_up(mask_file: Path) -> None:
    hanging = asyncio.Event()

    async def hang(request: GenerateRequest, index: int) -> None:
        if request.prompt == HELLO.prompt and index == 2:
            await hanging.wait()

    upstream = standin(FakeEngine(before_token=hang))
    async with gateway(upstream, mask_file, timeout_seconds=0.3) as engine:
        outputs = engine.generate(HELLO)
        await anext(outputs)
        with pytest.raises(EngineUnavailableError, match=r"said nothing for 0\.3 seconds"):
            await collect(outputs)
        await asyncio.wait_for(upstream.left.wait(), 10)
        hanging.set()


async def test_an_upstream_that_dies_makes_it_unready_and_one_that_comes_back_ready(mask_file: Path) -> None:
    upstream = standin()
    async with standing(upstream) as url:
        engine = await made(url, mask_file, watch_seconds=0.05)
        assert engine.healthy().ready
    try:
        with pytest.raises(EngineUnavailableError, match=r"cannot be reached|broke"):
            await collect(engine.generate(HELLO))
        assert "cannot be reached" in engine.healthy().reason or "broke" in engine.healthy().reason
        with pytest.raises(EngineUnavailableError) as refused:
            await engine.encode("some text")
        assert refused.value.retry_after_seconds
        async with standing(upstream, int(url.rpartition(":")[2])):
            await until(lambda: engine.healthy().ready)
            assert await collect(engine.generate(HELLO))
            upstream.health = 503
            await until(lambda: "not well (status 503" in engine.healthy().reason)
            upstream.health = 404  # has no such route
            await until(lambda: engine.healthy().ready)
            del upstream.models["demo-balanced"]
            await until(lambda: "does not list demo-balanced" in engine.healthy().reason)
            with pytest.raises(EngineUnavailableError, match="does not list demo-balanced"):
                await collect(engine.generate(HELLO))
    finally:
        await engine.close()
        await upstream.engine.close()


async def test_an_adapter_that_vanishes_makes_it_unready_at_the_first_request(mask_file: Path) -> None:
    upstream = standin()
    async with gateway(upstream, mask_file, watch_seconds=600) as engine:
        threshold = upstream.models.pop("demo-balanced")
        with pytest.raises(EngineUnavailableError, match="does not know the adapter"):
            await collect(engine.generate(replace(HELLO, threshold=threshold)))
        await until(lambda: "does not list demo-balanced" in engine.healthy().reason)
        upstream.models["demo-balanced"] = threshold


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"key": "right"}, "refuses this server's key"),
        ({"ignores_names": True}, "answers for a model that it does not have"),
        ({"tells_length": False}, "say it with --max-model-len"),
        ({"status": 500, "error": {}}, "does not answer with the model"),
    ],
)
async def test_an_upstream_that_cannot_be_trusted_is_refused_at_the_start(
    mask_file: Path, wrong: dict[str, Any], words: str
) -> None:
    async with standing(standin(**wrong)) as url:
        with pytest.raises(ModelError, match=words) as refused:
            await made(url, mask_file)
        assert "\n" not in str(refused.value)


async def test_an_adapter_that_is_not_listed_is_named_at_the_start(mask_file: Path) -> None:
    upstream = standin()
    del upstream.models["demo-balanced"]
    async with standing(upstream) as url:
        with pytest.raises(ModelError, match=r"does not list demo-balanced; it lists demo, demo-security"):
            await made(url, mask_file)
        with pytest.raises(ModelError, match="--adapter names the level 'nope'"):
            await made(url, mask_file, adapters={"nope": "x"})
        with pytest.raises(ModelError, match="--adapter names the level 'off'"):
            await made(url, mask_file, adapters={"off": "x"})


async def test_adapters_that_answer_alike_are_refused_at_the_start(mask_file: Path) -> None:
    """A name that stands for another level's adapter, or an engine that loads adapters and applies none."""
    upstream = standin()
    upstream.models["demo-balanced"] = upstream.models["demo-security-critical"]
    async with standing(upstream) as url:
        with pytest.raises(ModelError, match="'demo-security-critical' and 'demo-balanced' answer alike"):
            await made(url, mask_file)


async def test_an_upstream_that_is_not_there_is_refused_at_the_start(mask_file: Path) -> None:
    async with standing(standin()) as url:
        pass
    with pytest.raises(ModelError, match=f"{url} cannot be reached.*Start it first"):
        await made(url, mask_file)


async def test_the_key_is_sent_and_never_told(mask_file: Path, caplog: pytest.LogCaptureFixture) -> None:
    upstream = standin(key="a-secret-key")
    caplog.set_level("DEBUG")
    async with gateway(upstream, mask_file, key="a-secret-key") as engine:
        await collect(engine.generate(HELLO))
        assert upstream.asked[-1]["headers"]["authorization"] == "Bearer a-secret-key"
        assert "a-secret-key" not in repr(engine.describe()) + caplog.text


async def test_a_mask_with_a_level_that_is_recorded_as_less_safe_is_refused(tmp_path: Path) -> None:
    evaluation = {"levels": {"off": {"asr": {"rate": 0.5}}, "balanced": {"asr": {"rate": 0.6}}}}
    unsafe = replace(MASK, metadata=MASK.metadata.model_copy(update={"evaluation": evaluation}))
    file = save_mask(unsafe, tmp_path)
    async with standing(standin()) as url:
        with pytest.raises(UnsafeMaskError):
            await made(url, file)
        engine = await made(url, file, allow_less_safe_levels=True)
        await engine.close()
        with suppress(MaskError):
            await made(url, tmp_path / "no-such-file")
