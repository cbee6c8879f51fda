"""Texts that end an answer: wherever tokens begin and end, none of one gets out, and nothing else is lost."""

from collections.abc import AsyncGenerator

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.engines.base import Candidate, Output, TokenLogprob
from server.stops import until_stop
from tests.server.conftest import Ask, Control, events

pytestmark = pytest.mark.anyio

PIECES = st.lists(st.text("abc ", max_size=4), min_size=1, max_size=12)
STOPS = st.lists(st.text("abc ", min_size=1, max_size=3), min_size=1, max_size=4)


def logprob(text: str) -> TokenLogprob:
    return TokenLogprob(Candidate(0, text, text.encode(), -1.0), ())


async def said(pieces: list[str]) -> AsyncGenerator[Output, None]:
    for count, piece in enumerate(pieces, start=1):
        finish = "length" if count == len(pieces) else None
        yield Output(piece, (count,), finish, 1, count, logprobs=(logprob(piece),))  # type: ignore[arg-type]


@given(PIECES, STOPS)
async def test_an_answer_ends_before_the_first_stop(pieces: list[str], stops: list[str]) -> None:
    whole = "".join(pieces)
    places = [whole.find(stop) for stop in stops if stop in whole]
    # As it is said: the first stop that is complete ends the answer, the earliest where several become so.
    for end in range(len(whole) + 1):
        begun = [whole[:end].find(stop) for stop in stops if stop in whole[:end]]
        if begun:
            break
    outputs = [output async for output in until_stop(said(pieces), stops)]
    text = "".join(output.text for output in outputs)
    if places:
        assert outputs[-1].finish_reason == "stop"
        assert not any(stop in text for stop in stops)
        assert whole.startswith(text) and any(whole[len(text) :].startswith(stop) for stop in stops)
        assert len(text) <= min(begun)
    else:
        assert text == whole and outputs[-1].finish_reason == "length"
        assert [p.chosen.text for o in outputs for p in o.logprobs] == pieces
    assert [output.finish_reason is None for output in outputs] == [True] * (len(outputs) - 1) + [False]
    assert [output.num_completion_tokens for output in outputs] == list(range(1, len(outputs) + 1))


async def test_nothing_of_a_stop_gets_out_while_it_is_coming() -> None:
    outputs = [
        output async for output in until_stop(said(["one <", "/ti", "tle> two", " three"]), ["</title>"])
    ]
    assert [output.text for output in outputs] == ["one ", "", ""]
    assert outputs[-1].finish_reason == "stop"


async def test_what_was_held_back_comes_when_it_is_no_stop() -> None:
    outputs = [output async for output in until_stop(said(["a<", "/ti", "m> b"]), ["</title>"])]
    assert "".join(output.text for output in outputs) == "a</tim> b"


async def test_logprobs_of_tokens_behind_the_stop_stay_away() -> None:
    outputs = [output async for output in until_stop(said(["one", " st", "op", " more"]), ["stop"])]
    assert [p.chosen.text for o in outputs for p in o.logprobs] == ["one", " st"]


async def test_a_stop_ends_whole_answers_and_streams_alike_and_frees_the_engine(
    ask: Ask, client: httpx.AsyncClient
) -> None:
    whole = (await ask(temperature=0)).json()["choices"][0]["message"]["content"]
    stop = whole[20:26]
    cut = (await ask(temperature=0, stop=[stop, "never"])).json()
    assert cut["choices"][0]["message"]["content"] == whole[: whole.find(stop)]
    assert cut["choices"][0]["finish_reason"] == "stop"
    *chunks, done = events((await ask(temperature=0, stop=stop, stream=True)).text)
    assert done == "[DONE]"
    deltas = [chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks]
    assert "".join(deltas) == whole[: whole.find(stop)]
    metrics = (await client.get("/metrics")).text
    assert 'neurontune_num_requests_running{model_name="demo"} 0.0' in metrics
    assert 'neurontune_e2e_request_latency_seconds_count{model_name="demo"} 3.0' in metrics


async def test_n_answers_are_each_what_one_would_be(ask: Ask) -> None:
    several = (await ask(n=3, seed=5)).json()
    assert [choice["index"] for choice in several["choices"]] == [0, 1, 2]
    texts = [choice["message"]["content"] for choice in several["choices"]]
    alone = [(await ask(seed=5 + number)).json() for number in range(3)]
    assert texts == [each["choices"][0]["message"]["content"] for each in alone] and len(set(texts)) == 3
    usage = several["usage"]
    assert usage["prompt_tokens"] == alone[0]["usage"]["prompt_tokens"]
    assert usage["completion_tokens"] == sum(each["usage"]["completion_tokens"] for each in alone)
    *chunks, _ = events((await ask(n=3, seed=5, stream=True)).text)
    streamed = ["", "", ""]
    for chunk in chunks:
        [choice] = chunk["choices"]
        streamed[choice["index"]] += choice["delta"].get("content") or ""
    assert streamed == texts


async def test_an_id_is_echoed_or_made_on_answers_and_errors(client: httpx.AsyncClient) -> None:
    echoed = await client.get("/health", headers={"X-Request-Id": "abc-1"})
    assert echoed.headers["x-request-id"] == "abc-1"
    made = [(await client.get("/nothing")).headers["x-request-id"] for _ in range(2)]
    assert made[0] and made[0] != made[1]
    odd = await client.get("/health", headers={"X-Request-Id": "x" * 200})
    assert odd.headers["x-request-id"] not in ("", "x" * 200)


async def test_an_error_that_nobody_expected_has_its_id_too(ask: Ask, control: Control) -> None:
    control.fail_at = 0
    response = await ask(headers={"X-Request-Id": "abc-2"})
    assert response.status_code == 500 and response.headers["x-request-id"] == "abc-2"
