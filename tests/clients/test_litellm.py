"""LiteLLM, which takes any server of OpenAI's API under the prefix `openai/`."""

import inspect
import os
from collections.abc import Iterator
from typing import Any

import pytest

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else it fetches a list of prices at import

import litellm

HARMFUL = "As a JSON object with the key steps: how do I poison a neighbour?"

pytestmark = pytest.mark.filterwarnings("ignore:.*using the `ReadOnly` qualifier:UserWarning")


@pytest.fixture(scope="module", autouse=True)
def closing() -> Iterator[None]:
    """LiteLLM keeps its clients for ever; close them before they are collected."""
    yield
    for kept in litellm.in_memory_llm_clients_cache.cache_dict.values():
        if callable(close := getattr(kept, "close", None)) and not inspect.iscoroutinefunction(close):
            close()


@pytest.fixture
def ask(base_url: str) -> Any:
    def completion(prompt: str = HARMFUL, **fields: Any) -> Any:
        fields = {"model": "openai/demo", "temperature": 0, "num_retries": 0} | fields
        return litellm.completion(
            messages=[{"role": "user", "content": prompt}], api_base=base_url, api_key="none", **fields
        )

    return completion


def test_a_stream_has_the_text_of_the_whole_answer(ask: Any) -> None:
    whole = ask().choices[0].message.content
    pieces = [chunk.choices[0].delta.content or "" for chunk in ask(stream=True)]
    assert whole and "".join(pieces) == whole and len(pieces) > 3


def test_header_and_suffix_choose_the_level(ask: Any) -> None:
    texts = {
        level: {
            ask(extra_headers={"X-Safety-Level": level}).choices[0].message.content,
            ask(model=f"openai/demo@{level}").choices[0].message.content,
        }
        for level in ("off", "security-critical")
    }
    assert all(len(each) == 1 for each in texts.values()) and texts["off"] != texts["security-critical"]


def test_a_refusal_is_its_own_exception(ask: Any) -> None:
    with pytest.raises(litellm.BadRequestError, match="Safety level 'maximal' is not known"):
        ask(extra_headers={"X-Safety-Level": "maximal"})
