"""What goes to an upstream and what its chunks and refusals mean, where vLLM differs from what was asked."""

import json
from typing import Any

import pytest

from modulation.levels import ZERO
from server.engines.base import Chat, GenerateRequest, Grammar, GrammarError, Message, PromptError
from server.engines.upstream_wire import Reading, about_grammar, body_of

CHAT = Chat((Message("user", "Hi"),))


def place(token: str, logprob: float) -> dict[str, Any]:
    return {"token": token, "logprob": logprob, "bytes": list(token.encode())}


def test_the_likeliest_tokens_are_found_behind_one_that_was_drawn() -> None:
    """vLLM puts the token that was drawn first, then the likeliest, and cuts after as many as were asked."""
    drawn = place("c", -5.0)
    told = {**drawn, "top_logprobs": [drawn, place("a", -0.1), place("b", -1.0)]}
    choice = {"delta": {"content": "c"}, "logprobs": {"content": [told]}, "finish_reason": None}
    chunk = {"model": "m", "choices": [choice]}
    (output,) = Reading("m", "marker", 2).push(json.dumps(chunk).encode())
    (found,) = output.logprobs
    assert found.chosen.text == "c" and [each.text for each in found.top] == ["a", "b"]


@pytest.mark.parametrize(("wanted", "asked"), [(0, 0), (1, 2), (19, 20), (20, 20)])
def test_one_more_is_asked_for_up_to_the_most_that_may_be(wanted: int, asked: int) -> None:
    _, body = body_of(GenerateRequest(CHAT, ZERO, num_logprobs=wanted), "m")
    assert (body["logprobs"], body["top_logprobs"]) == (True, asked)


def test_a_refused_schema_is_the_grammars_and_other_refusals_are_not() -> None:
    grammar = Grammar("json_schema", "{}", "response_format")
    found = about_grammar(PromptError("Grammar error: Invalid type: no such type"), grammar)
    assert isinstance(found, GrammarError) and found.param == "response_format"
    for other in (
        about_grammar(PromptError("Grammar error"), None),
        about_grammar(PromptError("no such token", "logit_bias"), grammar),
    ):
        assert isinstance(other, PromptError)
