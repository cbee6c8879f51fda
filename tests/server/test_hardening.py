"""Nothing is unpickled, no foreign code runs unasked, and browsers are told what they may do."""

import ast
import logging
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from modulation.errors import ModelError, UnsafeMaskError
from modulation.loading import load_model, load_tokenizer
from modulation.masks import MaskMetadata
from server.app import create_app
from server.cli import build_engine
from server.draining import Drain
from server.engines.fake import FakeEngine
from server.engines.transformers import TransformersEngine
from server.hardening import SECURITY_HEADERS
from server.settings import Settings, read_settings
from tests.server.conftest import CHAT, Control
from tests.tiny_models import random_mask, tiny_chat_folder, tiny_model

ROOT = Path(__file__).parents[2]
SOURCES = sorted([*(ROOT / "modulation").rglob("*.py"), *(ROOT / "server").rglob("*.py")])
QUESTION = {"model": "demo", "messages": [{"role": "user", "content": "Hello there"}]}
ORIGIN = "https://app.example"

pytestmark = pytest.mark.anyio


def client_of(**settings: Any) -> httpx.AsyncClient:
    app = create_app(Settings(engine="fake", **settings), FakeEngine())
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost")


def test_no_code_of_ours_unpickles_or_evaluates() -> None:
    imports = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
    calls = {"eval", "exec", "torch.load", "np.load", "numpy.load", "yaml.load"}
    found = []
    for source in SOURCES:
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {each.name for each in node.names} | {getattr(node, "module", None)}
                found += [(source.name, name) for name in names & imports]
            elif isinstance(node, ast.Call) and ast.unparse(node.func) in calls:
                found.append((source.name, ast.unparse(node.func)))
    assert len(SOURCES) > 100 and not found


def test_weights_that_would_be_unpickled_are_not_loaded(tmp_path: Path) -> None:
    folder = tiny_chat_folder(tmp_path / "model")
    weights = tiny_model().state_dict()
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="safetensors"):
        load_model(str(folder), device="cpu", dtype="float32")


def test_code_that_comes_with_a_model_does_not_run_unasked(tmp_path: Path) -> None:
    folder = tiny_chat_folder(tmp_path / "model")
    trace = tmp_path / "ran"
    (folder / "theirs.py").write_text(f"open({str(trace)!r}, 'w').close()\nclass Theirs: pass\n")
    config = folder / "config.json"
    theirs = '"auto_map": {"AutoConfig": "theirs.Theirs", "AutoModelForCausalLM": "theirs.Theirs"}'
    config.write_text(
        config.read_text().replace('"model_type": "llama"', f'"model_type": "theirs", {theirs}')
    )
    with pytest.raises(ModelError, match=r"trust_remote_code|custom code"):
        load_model(str(folder), device="cpu", dtype="float32")
    load_tokenizer(str(folder))  # has no code of its own
    assert not trace.exists()


def test_trusting_remote_code_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), pytest.raises(ModelError):
        build_engine(read_settings({"model": "/none", "mask": "m.safetensors", "trust_remote_code": True}))
    assert "trust_remote_code is on" in caplog.text and "'/none'" in caplog.text


async def test_a_mask_less_safe_than_its_names_is_served_only_if_told_so(tmp_path: Path) -> None:
    folder = tiny_chat_folder(tmp_path / "model")
    mask = random_mask(load_model(str(folder), device="cpu", dtype="float32"))
    evaluation = {"levels": {"off": {"asr": {"rate": 0.1}}, "security-critical": {"asr": {"rate": 0.9}}}}
    metadata = MaskMetadata(**mask.metadata.model_dump() | {"evaluation": evaluation})
    file = tmp_path / "mask.safetensors"
    type(mask)(mask.safety, mask.utility, metadata).save(file)
    said = r"90\.0% of attacks succeed against 10\.0%"
    with pytest.raises(UnsafeMaskError, match=said):
        TransformersEngine(str(folder), file, served_model_name="tiny")
    mask.save(tmp_path / "sound.safetensors")
    engine = TransformersEngine(str(folder), tmp_path / "sound.safetensors", served_model_name="tiny")
    try:
        with pytest.raises(UnsafeMaskError, match=said):
            await engine.use_mask(type(mask).load(file))
        assert engine.describe().mask_digest == mask.digest
    finally:
        await engine.close()
    settings = read_settings(
        {"model": str(folder), "mask": str(file), "allow_less_safe_levels": True, "kv_cache_tokens": 1024}
    )
    engine = build_engine(settings)
    try:
        assert engine.healthy().ready
    finally:
        await engine.close()


@pytest.mark.parametrize("path", ["/health", "/v1/models", "/docs", "/nothing"])
async def test_every_answer_has_the_security_headers(path: str) -> None:
    async with client_of() as client:
        answer = await client.get(path)
        stream = await client.post(CHAT, json={**QUESTION, "stream": True})
    for name, value in SECURITY_HEADERS.items():
        assert answer.headers[name] == stream.headers[name] == value


async def test_failures_and_refusals_have_the_security_headers(control: Control, engine: FakeEngine) -> None:
    control.fail_at = 0
    drain = Drain()
    app = create_app(Settings(engine="fake"), engine, drain)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        answers = [await client.post(CHAT, json=QUESTION)]
        drain.begin(60)
        answers.append(await client.post(CHAT, json=QUESTION))
    assert [answer.status_code for answer in answers] == [500, 503]
    for answer in answers:
        for name, value in SECURITY_HEADERS.items():
            assert answer.headers.get_list(name) == [value]


async def test_no_other_origin_is_let_in_unless_it_is_named() -> None:
    async with client_of() as client:
        closed = await client.post(CHAT, json=QUESTION, headers={"Origin": ORIGIN})
        preflight = await client.options(
            CHAT, headers={"Origin": ORIGIN, "Access-Control-Request-Method": "POST"}
        )
    for answer in (closed, preflight):
        assert answer.status_code == 403 and "access-control-allow-origin" not in answer.headers
    async with client_of(cors_origins="https://app.example,https://b.example") as client:
        answer = await client.post(CHAT, json=QUESTION, headers={"Origin": ORIGIN})
        stranger = await client.post(CHAT, json=QUESTION, headers={"Origin": "https://c.example"})
        asked = "authorization, x-safety-level"
        preflight = await client.options(
            CHAT,
            headers={
                "Origin": ORIGIN,
                "Access-Control-Request-Method": "POST",
                "Access-Control-Request-Headers": asked,
            },
        )
    assert answer.headers["access-control-allow-origin"] == ORIGIN
    exposed = answer.headers["access-control-expose-headers"].lower().split(", ")
    told = ["level", "neurons", "mask"]
    rates = [f"x-ratelimit-{what}-tokens" for what in ("limit", "remaining", "reset")]
    assert {*rates, "x-request-id", "retry-after", *(f"x-safety-{each}" for each in told)} <= set(exposed)
    assert "access-control-allow-origin" not in stranger.headers
    assert preflight.status_code == 200 and asked in preflight.headers["access-control-allow-headers"]
