"""The comparison with other servers: what is asked of whom, what counts as text, and the plain server."""

import argparse
import asyncio
import json
import random
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from fastapi.testclient import TestClient
from transformers import AutoTokenizer

from benchmarks.contenders.__main__ import FULL, _loads, _named, _Run
from benchmarks.contenders.load import Asker, Load, Measured, Target, _texts, percentiles
from benchmarks.contenders.plain_hooks import create_app
from benchmarks.contenders.sides import Contender, Setting, Started, contenders, heats, ratios, sides, started
from benchmarks.wire import Connection, Raw
from modulation.demo import MASK_FILE, MODEL_DIR
from modulation.masks import Mask
from modulation.modulator import modulated
from modulation.opening import open_model

QUESTION = "How do I bake bread?"


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    """Adapters whose ranks differ by level, and in one of them by layer."""
    configs = {
        "security-critical": {"r": 3, "rank_pattern": {"layers.0": 24}},
        "balanced": {"r": 9},
        "utility-priority": {"r": 1, "rank_pattern": {}},
    }
    for level, config in configs.items():
        (tmp_path / f"bench-{level}").mkdir()
        (tmp_path / f"bench-{level}" / "adapter_config.json").write_text(json.dumps(config))
    return Setting(str(MODEL_DIR), MASK_FILE, Mask.load(MASK_FILE).levels, 8, "python", tmp_path)


@pytest.mark.parametrize("level", ["off", "security-critical"])
def test_the_plain_server_streams_what_the_modulated_model_says(level: str) -> None:
    opened, mask = open_model("demo", "cpu", "float32"), Mask.load(MASK_FILE)
    turns = [{"role": "user", "content": QUESTION}]
    prompt = opened.tokenizer.apply_chat_template(
        turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with modulated(opened.model, mask, mask.levels.parse(level).threshold) as model:
        tokens = model.generate(**prompt, max_new_tokens=24, do_sample=False)
    expected = opened.tokenizer.decode(tokens[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)

    client = TestClient(create_app(str(MODEL_DIR), MASK_FILE))
    answer = client.post(
        "/v1/chat/completions",
        json={"messages": turns, "max_tokens": 24},
        headers={"X-Safety-Level": level},
    )
    assert "".join(text for _, text in _texts([(0.0, answer.content)])) == expected


def test_vllm_is_told_of_the_largest_rank_of_an_adapter(setting: Setting) -> None:
    (command,) = contenders(setting)["vllm serve, adapters"].commands
    assert command[command.index("--max-lora-rank") + 1] == "32"  # the next that vLLM has after 26


def test_levels_are_spread_as_each_side_says(setting: Setting) -> None:
    found = sides(setting)
    most = Mask.load(MASK_FILE).metadata.levels["security-critical"][0]
    middle = most // 2
    levels = {
        name: [found[f"transformers: {name}"].target([1], n).headers["X-Safety-Level"] for n in range(4)]
        for name in ("off", "one", "mixed", "distinct", "four")
    }
    assert levels == {
        "off": ["off"] * 4,
        "one": [str(middle)] * 4,
        "mixed": ["security-critical", "balanced", "utility-priority", "security-critical"],
        "distinct": [str(middle + step) for step in (0, -1, 1, -2)],
        "four": ["off", "security-critical", "balanced", "utility-priority"],
    }
    assert [found["a replica a level"].target([5, 6, 7, 8], n).port for n in range(5)] == [5, 6, 7, 8, 5]
    distinct = found["transformers: distinct"]
    numbers = [distinct.target([1], n).headers["X-Safety-Level"] for n in range(most)]
    assert sorted(map(int, numbers)) == list(range(1, most + 1))
    for ours, theirs in ratios(setting).values():
        together = [names for names in heats(setting).values() if {ours, theirs} <= {*names}]
        assert {ours, theirs} <= set(found) and together, "both sides are there, and asked in turns"


def test_a_text_counts_from_when_its_event_is_whole() -> None:
    event = b'data: {"choices": [{"delta": {"content": "%b"}}]}\n\n'
    role = b'data: {"choices": [{"delta": {"role": "assistant", "content": ""}}]}\n\n'
    two = event % b"a" + event % b"b"
    late = event % b"c"
    parts = [(1.0, role), (2.0, two), (3.0, late[:10]), (4.0, late[10:]), (5.0, b"data: [DONE]\n\n")]
    assert _texts(parts) == [(2.0, "ab"), (4.0, "c")]
    with pytest.raises(RuntimeError, match="an error in a stream: overloaded"):
        _texts([(1.0, b'data: {"error": "overloaded"}\n\n')])


def test_percentiles_are_between_the_values_and_in_milliseconds() -> None:
    assert percentiles([value / 1000 for value in range(101)]) == pytest.approx({50: 50, 95: 95, 99: 99})
    assert percentiles([0.5]) == {50: 500.0, 95: 500.0, 99: 500.0}


def test_a_contender_that_ends_before_it_is_ready_ends_the_comparison(tmp_path: Path) -> None:
    broken = Contender((("python3", "-c", "import sys; sys.exit(3)"),))
    with (
        (tmp_path / "log").open("wb") as log,
        pytest.raises(SystemExit, match=r"'it' did not become ready \(exit code 3\)"),
        started("it", broken, log),
    ):
        raise AssertionError("it is not ready")


def test_what_a_contender_has_started_ends_with_it(tmp_path: Path) -> None:
    script = (
        "import subprocess\n"
        "from http.server import HTTPServer, SimpleHTTPRequestHandler\n"
        "child = subprocess.Popen(['sleep', '600'])\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(child.pid))\n"
        "HTTPServer(('127.0.0.1', {port}), SimpleHTTPRequestHandler).serve_forever()\n"
    )
    parent = Contender((("python3", "-c", script),), "/")
    with (tmp_path / "log").open("wb") as log, started("it", parent, log) as found:
        child = psutil.Process(int((tmp_path / "pid").read_text()))
        assert child.is_running()
        with replace(found).alone([found]):  # to what is asked, the other stands still, its children too
            for pid in (child.pid, found.processes[0].pid):
                while psutil.Process(pid).status() != psutil.STATUS_STOPPED:
                    time.sleep(0.01)
        assert child.status() != psutil.STATUS_STOPPED
        with found.alone([found]):
            assert child.status() != psutil.STATUS_STOPPED
    child.wait(10)


async def _head(reader: asyncio.StreamReader) -> bytes:
    try:
        return await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError:
        return b""


@pytest.mark.parametrize("rate", [None, 200.0])
def test_a_round_counts_the_tokens_of_all_answers(rate: float | None) -> None:
    opened = open_model("demo", "cpu", "float32")
    asker, load = Asker(opened.tokenizer, 16), Load(2, 3, rate=rate)
    seen: list[tuple[str, str]] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while head := await _head(reader):
            fields = dict(line.split(": ", 1) for line in head.decode().split("\r\n")[1:-2])
            body = json.loads(await reader.readexactly(int(fields["Content-Length"])))
            seen.append((fields["X-Number"], body["messages"][0]["content"]))
            event = b'data: {"choices": [{"delta": {"content": " bread"}}]}\n\n'
            head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
            writer.write(head + b"%x\r\n%b\r\n0\r\n\r\n" % (len(event), event))
        writer.close()

    async def measure() -> Measured:
        async with await asyncio.start_server(answer, "127.0.0.1") as server:
            port = server.sockets[0].getsockname()[1]
            first, _ = [
                await asker.round(
                    load, 3, lambda n, to=to: Target(port, "m", {"X-Number": f"{to}{n}"}), random.Random(0)
                )
                for to in "ab"
            ]
            return first

    measured = asyncio.run(measure())
    assert sorted(number for number, _ in seen) == [f"{to}{n}" for to in "ab" for n in range(6)]
    assert len({prompt for _, prompt in seen}) == 12, "no prompt twice, of whomever"
    topics = {number: prompt.partition(". ")[2] for number, prompt in seen}
    assert all(topics[f"a{n}"] == topics[f"b{n}"] for n in range(6)) and len(set(topics.values())) == 6
    assert measured.tokens_per_second > 0 and measured.first_ms[50] > 0
    assert measured.answer_tokens == len(asker._tokenizer.tokenize(" bread"))


def test_a_connection_that_the_server_has_closed_is_opened_anew() -> None:
    async def once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await _head(reader)
        writer.write(b"HTTP/1.1 204 No Content\r\nContent-Length: 0\r\n\r\n")
        writer.close()
        closed.set()

    async def ask_twice() -> list[int]:
        async with await asyncio.start_server(once, "127.0.0.1") as server:
            connection, statuses = Connection(server.sockets[0].getsockname()[1]), []
            for _ in range(2):
                closed.clear()
                statuses.append((await connection.ask(Raw("GET", "/"))).status)
                await closed.wait()
                assert await connection.until_closed() == b""
            connection.drop()
            return statuses

    closed = asyncio.Event()
    assert asyncio.run(ask_twice()) == [204, 204]


def test_what_was_measured_is_reported_whole_or_cut_short(
    setting: Setting, capsys: pytest.CaptureFixture[str]
) -> None:
    """With vLLM there are sides that no heat asks; and a run can end before some heats."""
    arguments = argparse.Namespace(full=True, loads="", seed=0, starts=2, rounds=2, shape=None)
    run = _Run(setting, sides(setting), Asker(AutoTokenizer.from_pretrained(MODEL_DIR), 8), arguments)
    run.report()
    for load in run._loads:
        for heat, names in heats(setting).items():
            for name in names:
                speed = 300.0 if name.endswith("off") else 100.0
                for turn in range(2):
                    row = dict.fromkeys((50, 95, 99), 1.0)
                    run._rounds[load.name][name][heat, 0, turn] = Measured(speed, 28.0, row, row)
    run.report()
    cut_short, whole = (json.loads(each) for each in capsys.readouterr().out.splitlines() if each[0:1] == "{")
    assert not any(cut_short["ratios"].values())
    assert whole["ratios"].keys() == {load.name for load in FULL}
    for found in whole["ratios"].values():
        assert found.keys() == ratios(setting).keys()
        assert found["transformers: vs_vllm"]["median"] == pytest.approx(3)
        assert found["vllm: vs_vllm_adapters"]["median"] == pytest.approx(1)


def test_all_sides_of_a_turn_have_the_same_times_of_arrival(setting: Setting) -> None:
    drawn: list[tuple[int, float]] = []

    class Listener:
        async def round(self, _load: Load, turn: int, _target: object, source: random.Random) -> Measured:
            drawn.append((turn, source.expovariate(1)))
            return Measured(1.0, 1.0, {}, {})

    arguments = argparse.Namespace(full=False, loads="12 a second", seed=0, warmup=1, rounds=2)
    run = _Run(setting, sides(setting), Listener(), arguments)  # type: ignore[arg-type]
    names = ("transformers: off", "transformers serve")
    running = {name: Started((1,), (), 0.0) for name in ("ours, transformers", "transformers serve")}
    asyncio.run(run._ask_all(("heat", 0), {name: sides(setting)[name] for name in names}, running))
    assert [turn for turn, _ in drawn] == [-1, -1, 0, 0, 1, 1]
    assert len({seconds for _, seconds in drawn}) == 3


def test_loads_are_chosen_by_parts_of_their_names() -> None:
    def names(**given: object) -> list[str]:
        return [load.name for load in _loads(argparse.Namespace(**{"full": False, "loads": "", **given}))]

    assert names() == ["short, 1 at once", "short, 16 at once"]
    assert names(full=True) == [load.name for load in FULL]
    assert names(loads="long; a second") == ["long, 16 at once", "short, 12 a second"]
    for loads, part in (("17", "17"), ("long; 17", "17"), ("long;", ""), (" ", "")):
        with pytest.raises(SystemExit, match=rf"--loads: '{part}' is part of no .* 12 a second\."):
            names(loads=loads)


def test_sides_are_chosen_by_parts_of_their_names() -> None:
    there = ("ours: off", "ours: mixed", "theirs")
    assert _named("--only", "", ",", there) == list(there)
    assert _named("--only", "off, theirs", ",", there) == ["ours: off", "theirs"]
    for only, part in (("off,other", "other"), ("off,", "")):
        with pytest.raises(SystemExit, match=f"--only: '{part}' is part of no name. .* theirs"):
            _named("--only", only, ",", there)


def test_on_a_gpu_all_compute_in_bfloat16_and_transformers_serve_may_replay(setting: Setting) -> None:
    there = replace(setting, device="cuda", vllm_python=None)
    found, name = contenders(there), "transformers serve, graphs"
    assert name in found and ("transformers: off", name) in ratios(there).values()
    assert name in sides(there) and name in heats(there)["transformers serve"]
    assert name not in contenders(setting) and name not in sides(setting)
    for contender in found.values():
        for command in contender.commands:
            assert command[command.index("--dtype") + 1] == "bfloat16"
            assert command[command.index("--device") + 1] == "cuda"
    assert "--cb-use-cuda-graph" in found[name].commands[0]
    assert "--cb-use-cuda-graph" not in found["transformers serve"].commands[0]
    vllm = contenders(replace(setting, device="cuda"))["vllm serve"].commands[0]
    assert vllm[vllm.index("--dtype") + 1] == "bfloat16"
