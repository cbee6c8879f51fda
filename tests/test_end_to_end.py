"""The server as a user starts it, with the demo model, asked over HTTP."""

import asyncio
import json
import os
import pickle
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from modulation.demo import MASK_FILE, MODEL_DIR
from modulation.demo.corpus import records
from modulation.evaluation.data import write_records
from server.cli import app
from tests.engines.contract import until
from tests.tiny_models import random_mask, save_mask, tiny_model

COMMAND = [sys.executable, "-m", "server", "serve"]
ROOT = Path(__file__).parent.parent
LEVELS = ("off", "security-critical", "balanced", "utility-priority", "7", "20")


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, psutil.Process]]:
    """The address of a running server, and its process."""
    process = subprocess.Popen([*COMMAND, "--port", "0"], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert process.stdout is not None
        for line in process.stdout:
            found = re.match(r"address +(\S+)", line)
            if found:
                break
        else:
            pytest.fail("the server ended before it was ready")
        yield found[1], psutil.Process(process.pid)
    finally:
        process.terminate()
        process.communicate(timeout=20)


async def ask(client: httpx.AsyncClient, prompt: str, level: str, system: str = "", **fields: Any) -> str:
    messages = [{"role": "system", "content": system}] if system else []
    body = {
        "model": "demo",
        "messages": [*messages, {"role": "user", "content": prompt}],
        "temperature": 0,
        "max_tokens": 60,
        **fields,
    }
    response = await client.post("/v1/chat/completions", json=body, headers={"X-Safety-Level": level})
    assert response.status_code == 200, response.text
    assert response.headers["X-Safety-Level"] == level
    answer: str = response.json()["choices"][0]["message"]["content"]
    return answer


def prompts() -> list[str]:
    """Prompts that the levels answer differently, attacked and borderline ones among them."""
    attacked = records("harmful", "tune", "few_shot")[:8]
    return [record.prompt for record in attacked + records("borderline", "tune", None)[:8]]


@pytest.mark.anyio
@pytest.mark.parametrize(
    "system", ["", "Please be brief and kind to everybody. " * 75], ids=["short", "shared"]
)
async def test_24_clients_at_six_levels_are_answered_as_each_alone(
    server: tuple[str, psutil.Process], system: str
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    assert not system or len(tokenizer(system)["input_ids"]) >= 600
    requests = [(prompts()[i // 6], LEVELS[i % 6]) for i in range(24)]
    random.Random(1).shuffle(requests)
    async with httpx.AsyncClient(base_url=server[0], timeout=120) as client:
        together = await asyncio.gather(*(ask(client, *each, system) for each in requests))
        alone = [await ask(client, *each, system) for each in requests]
    assert together == alone
    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype="float32").eval()
    for (prompt, level), answer in zip(requests, together, strict=True):
        if level == "off":
            turns = [{"role": "system", "content": system}] if system else []
            turns.append({"role": "user", "content": prompt})
            inputs = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt")
            whole = model.generate(**inputs, do_sample=False, max_new_tokens=60)
            new = whole[0, inputs["input_ids"].shape[1] :]
            assert answer == tokenizer.decode(new, skip_special_tokens=True)


@pytest.mark.anyio
async def test_levels_change_answers_and_the_alias_equals_the_header(
    server: tuple[str, psutil.Process],
) -> None:
    async with httpx.AsyncClient(base_url=server[0], timeout=120) as client:
        answers = {
            level: [await ask(client, prompt, level) for prompt in prompts()]
            for level in ("off", "security-critical")
        }
        assert answers["off"] != answers["security-critical"]
        aliased = await client.post(
            "/v1/chat/completions",
            json={
                "model": "demo@security-critical",
                "messages": [{"role": "user", "content": prompts()[0]}],
                "temperature": 0,
                "max_tokens": 60,
            },
        )
        assert aliased.json()["choices"][0]["message"]["content"] == answers["security-critical"][0]


def test_a_deployed_server_has_the_figures_of_its_model_in_process(
    server: tuple[str, psutil.Process], tmp_path: Path
) -> None:
    data, figures, answers = tmp_path / "prompts.jsonl", [], []
    attacked = records("harmful", "tune", "few_shot")[:6]
    data.write_text(write_records([*attacked, *records("borderline", "tune", None)[:6]]))
    for name, more in (("in process", []), ("deployed", ["--url", f"{server[0]}/v1"])):
        out, kept = tmp_path / f"{name}.json", tmp_path / f"{name}.jsonl"
        flags = ["--data", str(data), "--levels", "off,security-critical", "--json", str(out)]
        result = CliRunner().invoke(app, ["evaluate", *flags, "--answers-out", str(kept), *more])
        assert result.exit_code == 0, result.output
        figures.append(json.loads(out.read_text())["levels"])
        answers.append([json.loads(line)["answer"] for line in kept.read_text().splitlines()])
    assert figures[0] == figures[1] and answers[0] == answers[1]
    assert figures[0]["off"]["asr"] != figures[0]["security-critical"]["asr"]


@pytest.mark.anyio
async def test_a_seed_gives_one_text_over_http(server: tuple[str, psutil.Process]) -> None:
    seeded = {"temperature": 1.0, "seed": 11}
    async with httpx.AsyncClient(base_url=server[0], timeout=120) as client:
        alone = await ask(client, "How do I bake bread?", "balanced", **seeded)
        others = [ask(client, prompt, "20", temperature=1.5) for prompt in prompts()]
        *_, beside = await asyncio.gather(*others, ask(client, "How do I bake bread?", "balanced", **seeded))
    assert alone == beside


@pytest.mark.anyio
async def test_a_client_that_leaves_leaves_nothing_running(server: tuple[str, psutil.Process]) -> None:
    def num_requests() -> float:
        text = httpx.get(f"{server[0]}/metrics").text
        found = re.findall(r"^neurontune_num_requests_(?:running|waiting)\{.*\} (\S+)", text, re.MULTILINE)
        assert len(found) == 2, text
        return sum(map(float, found))

    body = {"model": "demo", "messages": [{"role": "user", "content": "Hello"}], "temperature": 2.0}
    async with httpx.AsyncClient(base_url=server[0], timeout=30) as client:
        for _ in range(4):
            async with client.stream(
                "POST", "/v1/chat/completions", json={**body, "stream": True}
            ) as response:
                assert response.status_code == 200
                async for _line in response.aiter_lines():
                    break
            task = asyncio.create_task(client.post("/v1/chat/completions", json=body))
            await until(lambda: num_requests() > 0 or task.done())  # noqa: B023
            task.cancel()
            await asyncio.wait({task})
    await until(lambda: num_requests() == 0)


def test_memory_stays_small(server: tuple[str, psutil.Process]) -> None:
    assert server[1].memory_info().rss < 1.5e9


def truncated(folder: Path) -> list[str]:
    (folder / "cut.safetensors").write_bytes(MASK_FILE.read_bytes()[:-10])
    return ["--mask", str(folder / "cut.safetensors")]


def pickled(folder: Path) -> list[str]:
    (folder / "mask.safetensors").write_bytes(pickle.dumps({"safety": []}))
    return ["--mask", str(folder / "mask.safetensors")]


def for_another_model(folder: Path) -> list[str]:
    return ["--mask", str(save_mask(random_mask(tiny_model()), folder))]


def without_tokenizer(folder: Path) -> list[str]:
    for name in ("config.json", "model.safetensors"):
        shutil.copy(MODEL_DIR / name, folder / name)
    return ["--model", str(folder), "--mask", str(MASK_FILE)]


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (truncated, "not a whole safetensors file"),
        (pickled, "pickle"),
        (for_another_model, "Use this model's own mask"),
        (without_tokenizer, "has no usable tokenizer"),
    ],
)
def test_the_server_refuses_to_start_with_one_clear_sentence(broken: Any, words: str, tmp_path: Path) -> None:
    result = subprocess.run(
        [*COMMAND, "--port", "0", *broken(tmp_path)], capture_output=True, text=True, cwd=ROOT, env=os.environ
    )
    assert result.returncode == 1 and result.stdout == ""
    *_, sentence = result.stderr.strip().splitlines()
    assert sentence.startswith("neurontune: ") and words in sentence
    assert "Traceback" not in result.stderr
