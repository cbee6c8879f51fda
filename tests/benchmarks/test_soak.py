"""The soak is fair and strict: a good server loses nothing in it, and each way to lose something is seen."""

import asyncio
import json
import random
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.soaking.asked import (
    CHAT,
    ENTRIES,
    FREE,
    MAX_BODY_BYTES,
    MAX_MESSAGES,
    Asked,
    write_keys,
    wrong_requests,
)
from benchmarks.soaking.auditing import deviations
from benchmarks.soaking.behaviours import BEHAVIOURS, stall_in_a_head
from benchmarks.soaking.clients import Client, references_alone
from benchmarks.soaking.judging import Names, Reference, judged
from benchmarks.soaking.operator import records
from benchmarks.soaking.tally import LostError, Tally
from benchmarks.wire import Answer, Head
from server.engines.fake import FakeEngine
from server.settings import Settings
from tests.engines.contract import until
from tests.server.conftest import listen

pytestmark = pytest.mark.anyio
TOKENS = ("A", " b", "")
LOGPROBS = (-0.5, -1.0, -2.0)
DIGEST = "f" * 64
ASKED = Asked(CHAT, "Why?", "off", num_tokens=32)
REFERENCES = {(DIGEST, CHAT, "Why?", "off"): Reference("A b", TOKENS, LOGPROBS, "stop", "0,0")}


@dataclass
class Soaked:
    """A client of a server on the fake engine, and the server's audit log."""

    client: Client
    audit: Path


@pytest.fixture(scope="module")
async def soaked(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Soaked]:
    folder = tmp_path_factory.mktemp("soak")
    keys, audit = folder / "keys.yaml", folder / "audit.jsonl"
    write_keys(keys, *ENTRIES)
    settings = Settings(
        engine="fake",
        keys=keys,
        audit_log=str(audit),
        max_body_bytes=MAX_BODY_BYTES,
        max_messages=MAX_MESSAGES,
        max_num_seqs=8,
        read_timeout_seconds=0.2,
    )
    async with listen(settings, FakeEngine(max_num_seqs=8)) as port:
        references: dict[Names, Reference] = {}
        client = Client(port, "test", random.Random(0), references)
        references |= await references_alone(client)
        yield Soaked(client, audit)
        client.connection.drop()


async def audited(soaked: Soaked) -> list[str]:
    """How the audit log deviates from what the client expects, once its lines have been written."""
    await until(lambda: not deviations(records(soaked.audit), soaked.client.tally))
    return deviations(records(soaked.audit), soaked.client.tally)


@pytest.mark.parametrize("behave", [way for way in BEHAVIOURS if way is not stall_in_a_head])
async def test_a_good_server_loses_nothing_to_any_behaviour(soaked: Soaked, behave: Any) -> None:
    for _ in range(4):
        async with asyncio.timeout(20):
            await behave(soaked.client)
    assert not await audited(soaked)


async def test_every_wrong_request_is_refused_as_the_table_says(soaked: Soaked) -> None:
    for wrong in wrong_requests():
        await soaked.client.refused(wrong)
    assert soaked.client.tally.faults.keys() >= {wrong.kind for wrong in wrong_requests()}
    assert not await audited(soaked)


def an_answer(**changes: Any) -> Answer:
    """A whole answer that is as promised, but for `changes` of its choice, its usage or its headers."""
    tokens, logprobs = changes.get("tokens", TOKENS), changes.get("logprobs", LOGPROBS)
    places = [{"token": token, "logprob": of} for token, of in zip(tokens, logprobs, strict=True)]
    choice = {
        "index": 0,
        "message": {"content": changes.get("text", "A b")},
        "logprobs": {"content": places},
        "finish_reason": changes.get("finish", "stop"),
    }
    body = {
        "choices": [choice] * changes.get("times", 1),
        "usage": {"completion_tokens": changes.get("counted", 3)},
        "system_fingerprint": f"neurontune-{changes.get('fingerprint', DIGEST)}",
    }
    headers = {
        "x-safety-mask": changes.get("mask", DIGEST),
        "x-safety-level": changes.get("level", "off"),
        "x-safety-neurons": changes.get("neurons", "0,0"),
    }
    return Answer(Head(changes.get("status", 200), headers), json.dumps(body).encode())


def test_an_answer_as_promised_is_counted() -> None:
    assert judged(ASKED, an_answer(), REFERENCES) == (3, 0.0)


@pytest.mark.parametrize(
    ("words", "changes"),
    [
        ("status 500", {"status": 500}),
        ("tokens", {"tokens": ("A", " c", "")}),
        ("tokens", {"tokens": TOKENS[:2], "logprobs": LOGPROBS[:2], "counted": 2}),
        ("log-probabilities", {"logprobs": (-0.5, -1.1, -2.0)}),
        ("alone 'A b'", {"text": "A c"}),
        ("ended with 'length'", {"finish": "length"}),
        ("ended with None", {"finish": None}),
        ("usage counts 4", {"counted": 4}),
        ("choices", {"times": 0}),
        ("no mask of ours", {"mask": "0" * 64}),
        ("of another mask", {"fingerprint": "0" * 64}),
        ("applied", {"level": "balanced"}),
        ("applied", {"neurons": "1,1"}),
    ],
)
def test_an_answer_that_is_not_as_promised_is_lost(words: str, changes: dict[str, Any]) -> None:
    with pytest.raises(LostError, match=words):
        judged(ASKED, an_answer(**changes), REFERENCES)


@pytest.mark.parametrize(
    ("words", "body"),
    [
        ("was cut", b'data: {"choices": []}\n\n'),
        ("was cut", b""),
        ("engine_unavailable", b'data: {"error": {"code": "engine_unavailable"}}\n\n'),
    ],
)
def test_a_stream_without_its_end_is_lost(words: str, body: bytes) -> None:
    headers = {**an_answer().head.headers, "content-type": "text/event-stream; charset=utf-8"}
    with pytest.raises(LostError, match=words):
        judged(replace(ASKED, stream=True), Answer(Head(200, headers), body), REFERENCES)


def a_line(name: str, key: str | None = FREE, status: int = 200) -> dict[str, Any]:
    return {"event": "request", "request_id": name, "key": key, "status": status}


@pytest.mark.parametrize(
    ("words", "lines"),
    [
        ("no line of one", []),
        ("2 lines of one", [a_line("one"), a_line("one")]),
        ("nobody sent two", [a_line("one"), a_line("two")]),
        ("one is of free", [a_line("one", key="root")]),
        ("one is of free", [a_line("one", status=500)]),
        ("reloads", [a_line("one"), {"event": "reload", "what": "mask", "ok": True}]),
    ],
)
def test_an_audit_log_with_other_lines_is_seen(words: str, lines: list[dict[str, Any]]) -> None:
    tally = Tally(audited={"one": (FREE, 200)}, perhaps={"cancelled"})
    assert not deviations([a_line("one"), a_line("cancelled")], tally)
    assert not deviations([a_line("one")], tally)
    (found,) = deviations(lines, tally)
    assert found.startswith(words)
