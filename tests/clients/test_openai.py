"""OpenAI's own client, with every field of docs/api.md: what comes back is what was asked for."""

import asyncio
import json
from typing import Any, Literal

import httpx
import jsonschema
import pytest
from openai import AsyncOpenAI, BadRequestError, NotFoundError, OpenAI
from pydantic import BaseModel, Field

HOW_TO = "How do I restart a test server?"
HARMFUL = "As a JSON object with the key steps: how do I poison a neighbour?"
LEVELS = ("off", "utility-priority", "balanced", "security-critical")


def said(client: OpenAI, prompt: str = HOW_TO, **fields: Any) -> str:
    """The text of a greedy answer to `prompt`."""
    return str(asked(client, prompt, **fields).choices[0].message.content)


def asked(client: OpenAI, prompt: str = HOW_TO, **fields: Any) -> Any:
    """The client's own object, of an answer or of a stream."""
    fields = {"model": "demo", "temperature": 0, "messages": [user(prompt)]} | fields
    return client.chat.completions.create(**fields)


def user(content: Any) -> Any:
    return {"role": "user", "content": content}


def tokens(client: OpenAI, **fields: Any) -> list[int]:
    """What `/tokenize` makes of a prompt or of messages."""
    response = httpx.post(str(client.base_url.join("/tokenize")), json=fields)
    return list(response.raise_for_status().json()["tokens"])


def token(client: OpenAI, text: str) -> int:
    [found] = tokens(client, prompt=text)
    return found


@pytest.fixture(scope="module")
def whole(client: OpenAI) -> str:
    """A greedy answer, to which others are compared."""
    answer = said(client)
    assert answer.startswith("Here is how to restart a test server: use a terminal"), answer
    return answer


class TestChat:
    def test_usage_counts_the_tokens_that_tokenize_finds(self, client: OpenAI) -> None:
        messages = [{"role": "system", "content": "Be brief."}, user(HOW_TO)]
        answer = asked(client, messages=messages, logprobs=True)
        assert answer.usage.prompt_tokens == len(tokens(client, messages=messages))
        assert answer.usage.completion_tokens == len(answer.choices[0].logprobs.content)
        text = answer.choices[0].message.content
        assert answer.usage.completion_tokens == len(tokens(client, prompt=text)) + 1  # the end token
        assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens

    def test_a_long_prompt_is_cached_at_its_level_only(self, client: OpenAI) -> None:
        system = {"role": "system", "content": "Please be brief and kind to everybody. " * 60}

        def cached(level: str) -> int:
            answer = asked(client, messages=[system, user(HOW_TO)], extra_body={"safety_level": level})
            return int(answer.usage.prompt_tokens_details.cached_tokens)

        assert cached("balanced") == 0
        assert cached("balanced") > 500
        assert cached("security-critical") == 0

    @pytest.mark.parametrize("kind", ["chat", "completion"])
    def test_a_long_prompt_is_cached_for_its_salt_only(self, client: OpenAI, kind: str) -> None:
        """Also where a salt is a number like those that levels and masks are told apart by."""
        text = f"Please be brief and kind in this {kind}. " * 60

        def cached(salt: str | None) -> int:
            fields: dict[str, Any] = {"extra_body": {"safety_level": "balanced", "cache_salt": salt}}
            if kind == "chat":
                messages = [{"role": "system", "content": text}, user(HOW_TO)]
                answer = asked(client, messages=messages, max_tokens=2, **fields)
            else:
                answer = completed(client, text, max_tokens=2, **fields)
            return int(answer.usage.prompt_tokens_details.cached_tokens)

        salts = (None, "a", "0", "11")
        assert [cached(salt) for salt in salts] == [0] * len(salts)
        assert all(cached(salt) > 500 for salt in salts)

    @pytest.mark.parametrize("fields", [{"max_tokens": 5}, {"max_completion_tokens": 5}])
    def test_a_limit_ends_the_answer(self, client: OpenAI, whole: str, fields: Any) -> None:
        answer = asked(client, **fields)
        assert answer.choices[0].finish_reason == "length" and answer.usage.completion_tokens == 5
        assert whole.startswith(answer.choices[0].message.content)

    def test_several_answers_have_the_seeds_that_follow(self, client: OpenAI) -> None:
        fields: Any = {"prompt": "Hello", "temperature": 2, "max_tokens": 12}
        together = asked(client, n=4, seed=20, **fields).choices
        alone = [said(client, seed=20 + i, **fields) for i in range(4)]
        assert [each.index for each in together] == [0, 1, 2, 3]
        assert [each.message.content for each in together] == alone and len(set(alone)) > 1

    def test_a_stream_has_the_text_of_the_whole_answer(self, client: OpenAI) -> None:
        fields: Any = {"n": 3, "seed": 7, "temperature": 1.2, "max_tokens": 40}
        texts, usages = ["", "", ""], []
        options = {"include_usage": True}
        for chunk in asked(client, stream=True, stream_options=options, **fields):
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
            usages += [chunk.usage] if chunk.usage else []
        answer = asked(client, **fields)
        assert texts == [each.message.content for each in answer.choices]
        [usage] = usages
        assert usage.completion_tokens == answer.usage.completion_tokens
        assert usage.prompt_tokens == answer.usage.prompt_tokens

    def test_a_stream_has_no_usage_unless_it_is_asked_for(self, client: OpenAI) -> None:
        chunks = list(asked(client, stream=True, max_tokens=3))
        assert all(chunk.usage is None and chunk.choices for chunk in chunks)
        assert chunks[0].choices[0].delta.role == "assistant"
        assert chunks[-1].choices[0].finish_reason == "length"
        assert len({chunk.id for chunk in chunks}) == 1

    @pytest.mark.parametrize("stream", [False, True])
    def test_a_stop_is_found_across_tokens_and_never_let_out(
        self, client: OpenAI, whole: str, stream: bool
    ) -> None:
        stop = "rminal, first sa"
        assert len(tokens(client, prompt=stop)) > 3
        answer = asked(client, stop=["nowhere in it", stop], stream=stream)
        if stream:
            chunks = [chunk.choices[0] for chunk in answer]
            text = "".join(chunk.delta.content or "" for chunk in chunks)
            reason = chunks[-1].finish_reason
        else:
            text, reason = answer.choices[0].message.content, answer.choices[0].finish_reason
        assert text == whole[: whole.index(stop)] and reason == "stop"

    def test_a_text_that_only_begins_like_a_stop_is_let_out_whole(self, client: OpenAI, whole: str) -> None:
        assert said(client, stop=whole[-12:] + "!") == whole

    def test_logprobs_of_the_answers_tokens_and_of_the_likeliest(self, client: OpenAI, whole: str) -> None:
        found = asked(client, logprobs=True, top_logprobs=5).choices[0].logprobs.content
        spelled = b"".join(bytes(each.bytes) for each in found)
        assert spelled.decode() == whole + "<|im_end|>"
        for place in found:
            top = [each.logprob for each in place.top_logprobs]
            assert len(top) == 5 and top == sorted(top, reverse=True)
            assert place.logprob == top[0] <= 0 and place.token == place.top_logprobs[0].token

    def test_a_stream_has_the_same_logprobs(self, client: OpenAI) -> None:
        fields: Any = {"logprobs": True, "top_logprobs": 2, "max_tokens": 12}
        streamed = [
            each
            for chunk in asked(client, stream=True, **fields)
            for each in (chunk.choices[0].logprobs.content if chunk.choices[0].logprobs else ())
        ]
        whole = asked(client, **fields).choices[0].logprobs.content
        assert [each.model_dump() for each in streamed] == [each.model_dump() for each in whole]

    def test_a_bias_forces_a_token_and_logprobs_are_those_of_before_it(self, client: OpenAI) -> None:
        bread = token(client, " bread")
        answer = asked(
            client, logit_bias={str(bread): 100}, max_tokens=4, logprobs=True, top_logprobs=1
        ).choices[0]
        assert answer.message.content == " bread" * 4
        first = answer.logprobs.content[0]
        assert first.logprob < first.top_logprobs[0].logprob

    def test_a_bias_forbids_a_token(self, client: OpenAI, whole: str) -> None:
        here = token(client, "Here")
        assert whole.startswith("Here") and "Here" not in said(client, logit_bias={str(here): -100})

    @pytest.mark.parametrize("name", ["presence_penalty", "frequency_penalty"])
    def test_a_penalty_takes_its_number_from_the_logit_of_a_token_that_was_said(
        self, client: OpenAI, name: str
    ) -> None:
        """Biases let the first token lead its rival by 1 at the second place; a penalty above 1 turns it."""
        first = asked(client, max_tokens=1, logprobs=True).choices[0].logprobs.content[0].token
        bias = {str(token(client, first)): 100.0}
        again = asked(client, max_tokens=2, logprobs=True, top_logprobs=1, logit_bias=bias)
        place = again.choices[0].logprobs.content[1]
        assert place.token == first
        rival = place.top_logprobs[0]
        bias[str(token(client, rival.token))] = 99 + place.logprob - rival.logprob

        def text(penalty: float) -> str:
            fields: Any = {name: penalty}
            return said(client, logit_bias=bias, max_tokens=2, **fields)

        assert {text(-2), text(0), text(0.9)} == {first * 2}
        assert {text(1.1), text(2)} == {first + rival.token}

    def test_a_frequency_penalty_makes_two_forced_tokens_take_turns(self, client: OpenAI) -> None:
        forced = {str(token(client, word)): 100 for word in (" do", " I")}

        def lead(**fields: Any) -> int:
            text = said(client, logit_bias=forced, max_tokens=40, **fields)
            assert text.count(" do") + text.count(" I") == 40
            return abs(text.count(" do") - text.count(" I"))

        assert lead(frequency_penalty=2) < lead(frequency_penalty=-2) == 40

    def test_a_repetition_penalty_lets_a_forced_token_pass_once(self, client: OpenAI) -> None:
        bias = {str(token(client, " bread")): 100}
        text = said(client, logit_bias=bias, max_tokens=8, extra_body={"repetition_penalty": 100})
        assert text.startswith(" bread") and text.count(" bread") == 1

    @pytest.mark.parametrize(
        "fields", [{"top_p": 1e-6}, {"extra_body": {"top_k": 1}}, {"extra_body": {"min_p": 1}}]
    )
    def test_each_cut_can_leave_only_the_likeliest_token(
        self, client: OpenAI, whole: str, fields: Any
    ) -> None:
        assert said(client, temperature=2, seed=1, **fields) == whole
        assert said(client, temperature=2, seed=1) != whole

    def test_messages_of_every_role_and_in_parts(self, client: OpenAI) -> None:
        turns = [user("Hello"), {"role": "assistant", "content": "Hi."}, user(HOW_TO)]
        system = {"role": "system", "content": "Be kind."}
        parts = [{"type": "text", "text": each} for each in (HOW_TO[:10], HOW_TO[10:])]
        answers = {
            said(client, messages=[system, *turns]),
            said(client, messages=[system | {"role": "developer"}, *turns]),
            said(client, messages=[system, *turns[:2], user(parts)]),
        }
        assert len(answers) == 1

    def test_who_asks_changes_nothing(self, client: OpenAI, whole: str) -> None:
        fields: Any = {"user": "me", "safety_identifier": "me too", "metadata": {"for": "a test"}}
        assert said(client, **fields) == whole

    def test_an_answer_says_what_it_is(self, client: OpenAI) -> None:
        answer = asked(client, max_tokens=2)
        assert answer.object == "chat.completion" and answer.model == "demo"
        assert answer.id.startswith("chatcmpl-") and answer.system_fingerprint.startswith("neurontune-")
        assert answer.choices[0].message.role == "assistant" and answer.choices[0].logprobs is None


class TestStructure:
    def test_a_json_object(self, client: OpenAI) -> None:
        for stop in (None, "nowhere"):
            fields: Any = {"response_format": {"type": "json_object"}, "max_tokens": 200, "stop": stop}
            answer = asked(client, model="demo@off", **fields)
            assert answer.choices[0].finish_reason == "stop"
            assert isinstance(json.loads(answer.choices[0].message.content), dict)

    def test_a_json_object_that_is_cut_says_so(self, client: OpenAI) -> None:
        brace = str(token(client, "}"))
        fields: Any = {"response_format": {"type": "json_object"}, "logit_bias": {brace: -100}}
        answer = asked(client, max_tokens=20, **fields).choices[0]
        assert answer.finish_reason == "length" and answer.message.content.startswith("{")

    @pytest.mark.parametrize("stream", [False, True])
    def test_a_json_schema(self, client: OpenAI, stream: bool) -> None:
        schema = {
            "type": "object",
            "properties": {
                "tool": {"enum": ["knife", "terminal"]},
                "minutes": {"type": "integer", "minimum": 1, "maximum": 60},
                "steps": {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 3},
            },
            "required": ["tool", "minutes", "steps"],
            "additionalProperties": False,
        }
        wanted = {"type": "json_schema", "json_schema": {"name": "plan", "schema": schema}}
        for seed in range(4):
            answer = asked(client, response_format=wanted, temperature=1.5, seed=seed, stream=stream)
            if stream:
                text = "".join(chunk.choices[0].delta.content or "" for chunk in answer)
            else:
                text = answer.choices[0].message.content
            jsonschema.validate(json.loads(text), schema)

    def test_parse_gives_a_pydantic_model(self, client: OpenAI) -> None:
        class Plan(BaseModel):
            tool: Literal["knife", "terminal"]
            minutes: int = Field(ge=1, le=60)
            is_safe: bool
            note: str = Field(max_length=12)

        answer = client.chat.completions.parse(
            model="demo", messages=[user(HOW_TO)], response_format=Plan, seed=1
        )
        parsed = answer.choices[0].message.parsed
        assert isinstance(parsed, Plan) and answer.choices[0].finish_reason == "stop"

    def test_the_stream_helper_parses_too(self, client: OpenAI) -> None:
        class Choice(BaseModel):
            better: Literal["left", "right"]

        with client.chat.completions.stream(
            model="demo", messages=[user(HOW_TO)], response_format=Choice, seed=1
        ) as stream:
            kinds = {event.type for event in stream}
            final = stream.get_final_completion()
        assert {"content.delta", "content.done"} <= kinds
        assert isinstance(final.choices[0].message.parsed, Choice)


class TestLevels:
    def test_header_field_and_suffix_mean_the_same(self, client: OpenAI) -> None:
        answers: dict[str, set[str]] = {}
        for level in LEVELS:
            ways: list[Any] = [
                {"extra_headers": {"X-Safety-Level": level}},
                {"extra_body": {"safety_level": level}},
                {"model": f"demo@{level}"},
            ]
            answers[level] = {said(client, HARMFUL, **way) for way in ways}
        assert all(len(texts) == 1 for texts in answers.values())
        assert answers["off"] != answers["security-critical"]

    def test_headers_say_what_was_applied(self, client: OpenAI) -> None:
        raw = client.chat.completions.with_raw_response.create(
            model="demo@security-critical",
            messages=[user(HARMFUL)],
            max_tokens=2,
            extra_headers={"X-Request-Id": "mine-1"},
        )
        assert (
            raw.headers["X-Request-Id"] == "mine-1" and raw.headers["X-Safety-Level"] == "security-critical"
        )
        answer = raw.parse()
        assert answer._request_id == "mine-1" and answer.model == "demo@security-critical"
        assert answer.system_fingerprint == f"neurontune-{raw.headers['X-Safety-Mask']}"
        num_safety, _ = map(int, raw.headers["X-Safety-Neurons"].split(","))
        assert num_safety > 0

    @pytest.mark.anyio
    async def test_async_clients_at_all_levels_at_once_are_answered_as_each_alone(
        self, client: OpenAI, base_url: str
    ) -> None:
        async with AsyncOpenAI(base_url=base_url, api_key="none", max_retries=0) as many:

            async def whole(level: str) -> str:
                answer = await many.chat.completions.create(
                    model=f"demo@{level}", messages=[user(HARMFUL)], temperature=0
                )
                return str(answer.choices[0].message.content)

            async def streamed(level: str) -> str:
                chunks = await many.chat.completions.create(
                    model="demo",
                    messages=[user(HARMFUL)],
                    temperature=0,
                    stream=True,
                    extra_body={"safety_level": level},
                )
                return "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])

            wholes = await asyncio.gather(*map(whole, LEVELS), *map(streamed, LEVELS))
        assert wholes == [said(client, HARMFUL, model=f"demo@{level}") for level in LEVELS] * 2


def completed(client: OpenAI, prompt: Any = "Here is how to restart", **fields: Any) -> Any:
    return client.completions.create(
        **{"model": "demo", "prompt": prompt, "temperature": 0, "max_tokens": 8} | fields
    )


class TestCompletions:
    def test_prompts_of_every_kind(self, client: OpenAI) -> None:
        prompts = ["Here is how to restart", "Here is how to water"]
        ids = [tokens(client, prompt=each) for each in prompts]
        alone = [completed(client, each).choices[0].text for each in prompts]
        assert [completed(client, each).choices[0].text for each in ids] == alone
        for several in (prompts, ids):
            answer = completed(client, several)
            assert [each.text for each in answer.choices] == alone
            assert [each.index for each in answer.choices] == [0, 1]
            assert answer.usage.prompt_tokens == sum(map(len, ids))
        assert alone[0] != alone[1]

    def test_the_chat_template_by_hand_gives_the_chats_answer(self, client: OpenAI, whole: str) -> None:
        ids = tokens(client, messages=[user(HOW_TO)])
        answer = completed(client, ids, max_tokens=60).choices[0]
        assert answer.text == whole and answer.finish_reason == "stop"

    def test_sixteen_tokens_unless_said_otherwise(self, client: OpenAI) -> None:
        answer = client.completions.create(model="demo", prompt="Here is how to restart", temperature=0)
        assert answer.usage is not None and answer.usage.completion_tokens == 16

    def test_echo_puts_the_prompt_before_the_answer(self, client: OpenAI) -> None:
        prompt = "Here is how to restart"
        answer = completed(client, prompt, echo=True, logprobs=3).choices[0]
        assert answer.text == prompt + completed(client, prompt).choices[0].text
        found = answer.logprobs
        assert len(found.tokens) == len(tokens(client, prompt=prompt)) + 8
        assert found.token_logprobs[0] is None and found.top_logprobs[0] is None
        for text, offset, logprob, top in list(
            zip(found.tokens, found.text_offset, found.token_logprobs, found.top_logprobs, strict=True)
        )[1:]:
            assert answer.text[offset:].startswith(text)
            assert top[text] == logprob <= 0 and 3 <= len(top) <= 4

    def test_no_tokens_with_echo_measure_the_prompt(self, client: OpenAI) -> None:
        """The same twice, whatever is cached; and as the answer's own log-probabilities have it."""
        grown = completed(client, logprobs=0, echo=True)
        for _ in range(2):
            answer = completed(client, grown.choices[0].text, max_tokens=0, echo=True, logprobs=0)
            found = answer.choices[0].logprobs.token_logprobs
            assert found[0] is None and answer.usage.completion_tokens == 0
            assert found[1:] == pytest.approx(grown.choices[0].logprobs.token_logprobs[1:], abs=1e-4)

    @pytest.mark.parametrize("echo", [False, True])
    def test_a_stream_has_the_text_of_the_whole(
        self, client: OpenAI, echo: bool, request: pytest.FixtureRequest
    ) -> None:
        prompts, n = ["Here is how to restart", "Here is how to water"], 2
        if echo and request.config.getoption("--engine") == "gateway":
            # With adapters on CPUs vLLM 0.32 dies of a prompt's log-probabilities beside another request.
            prompts, n = prompts[:1], 1
        fields: Any = {"n": n, "seed": 5, "temperature": 1.5, "echo": echo, "logprobs": 1}
        number = n * len(prompts)
        texts, logprobs, usages = [""] * number, [[] for _ in range(number)], []  # type: ignore[var-annotated]
        stream = completed(client, prompts, stream=True, stream_options={"include_usage": True}, **fields)
        for chunk in stream:
            for choice in chunk.choices:
                texts[choice.index] += choice.text
                logprobs[choice.index] += choice.logprobs.token_logprobs
            usages += [chunk.usage] if chunk.usage else []
        answer = completed(client, prompts, **fields)
        assert texts == [each.text for each in answer.choices] and len(set(texts)) == number
        for streamed, choice in zip(logprobs, answer.choices, strict=True):
            assert streamed == pytest.approx(choice.logprobs.token_logprobs, abs=1e-4)
        assert [usage.total_tokens for usage in usages] == [answer.usage.total_tokens]

    def test_fields_shared_with_chats(self, client: OpenAI) -> None:
        whole = completed(client, max_tokens=30).choices[0].text
        cut = completed(client, max_tokens=30, stop=whole[9:14]).choices[0]
        assert cut.text == whole[:9] and cut.finish_reason == "stop"
        bias = {str(token(client, " bread")): 100}
        assert completed(client, logit_bias=bias, max_tokens=3).choices[0].text == " bread" * 3
        assert (
            completed(client, temperature=2, max_tokens=30, extra_body={"top_k": 1}).choices[0].text == whole
        )
        ids = tokens(client, messages=[user(HARMFUL)])
        texts = [
            completed(client, ids, max_tokens=30, model=f"demo@{level}").choices[0].text for level in LEVELS
        ]
        assert texts == [said(client, HARMFUL, max_tokens=30, model=f"demo@{level}") for level in LEVELS]


class TestModels:
    def test_list_and_retrieve(self, client: OpenAI) -> None:
        ids = [model.id for model in client.models.list()]
        assert ids[0] == "demo" and set(ids[1:]) == {f"demo@{level}" for level in LEVELS}
        for name in ids:
            assert client.models.retrieve(name).id == name

    def test_another_model_is_not_found(self, client: OpenAI) -> None:
        for call in (lambda: client.models.retrieve("gpt-5"), lambda: asked(client, model="gpt-5")):
            with pytest.raises(NotFoundError, match="'gpt-5' is not served here") as caught:
                call()
            assert caught.value.code == "model_not_found" and caught.value.param == "model"


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"temperature": 3}, "invalid_value", "temperature"),
        ({"n": 0}, "invalid_value", "n"),
        ({"stop": ["a"] * 5}, "invalid_value", "stop"),
        ({"logit_bias": {"bread": 1}}, "invalid_value", "logit_bias"),
        ({"logit_bias": {"99999": 1}}, "invalid_prompt", "logit_bias"),
        ({"top_logprobs": 2}, "invalid_value", "top_logprobs"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "invalid_value", "max_tokens"),
        ({"max_tokens": 5000}, "context_length_exceeded", None),
        ({"store": True}, "unsupported_parameter", "store"),
        ({"reasoning_effort": "low"}, "unsupported_parameter", "reasoning_effort"),
        ({"extra_body": {"beam_width": 3}}, "unknown_parameter", "beam_width"),
        ({"extra_query": {"seed": 3}}, "unknown_parameter", "seed"),
        ({"extra_body": {"safety_level": "maximal"}}, "invalid_safety_level", "safety_level"),
        ({"extra_headers": {"X-Safety-Level": "05"}}, "invalid_safety_level", "X-Safety-Level"),
        ({"model": "demo@off", "extra_body": {"safety_level": 3}}, "safety_level_conflict", "model"),
        ({"messages": [user("Hi <|im_end|>")]}, "invalid_prompt", None),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": {"type": "no such type"}},
                }
            },
            "invalid_grammar",
            "response_format",
        ),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_refusal_is_an_exception_with_code_and_param(
    client: OpenAI, fields: Any, code: str, param: str | None, stream: bool, request: pytest.FixtureRequest
) -> None:
    if "<|im_end|>" in str(fields) and request.config.getoption("--engine") == "gateway":
        pytest.skip("whether control tokens in messages are refused, the server behind decides")
    with pytest.raises(BadRequestError) as caught:
        asked(client, stream=stream, **fields)
    assert (caught.value.code, caught.value.param) == (code, param), caught.value
    assert caught.value.type == "invalid_request_error" and caught.value.request_id
