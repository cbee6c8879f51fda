"""`POST /admin/mask` and SIGHUP: a mask that fits is in force at once, any other changes nothing."""

import asyncio
import json
import os
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from modulation.errors import MaskMismatchError
from modulation.masks import Mask
from server.app import create_app
from server.engines.base import EngineInfo
from server.engines.fake import MASK_DIGEST, FakeEngine
from server.mask_swap import MaskSwap
from server.settings import Settings
from tests.server.conftest import CHAT, error_of
from tests.server.keying import bearer, key_file
from tests.tiny_models import random_mask, save_mask, tiny_model

pytestmark = pytest.mark.anyio
URL = "/admin/mask"


@pytest.fixture(scope="module")
def mask() -> Mask:
    return random_mask(tiny_model(), num_safety=40, num_utility=20)


@pytest.fixture
def folder(tmp_path: Path, mask: Mask) -> Path:
    """Masks: a good one, one without `utility-priority`, and what is none."""
    folder = tmp_path / "masks"
    folder.mkdir()
    save_mask(mask, folder, "good.safetensors")
    levels = {name: each for name, each in mask.metadata.levels.items() if name != "utility-priority"}
    without = replace(mask, metadata=mask.metadata.model_copy(update={"levels": levels}))
    save_mask(without, folder, "without.safetensors")
    (folder / "none.safetensors").write_bytes(b"\x80not safetensors at all")
    save_mask(mask, tmp_path, "outside.safetensors")
    os.mkfifo(folder / "pipe.safetensors")
    (folder / "link.safetensors").symlink_to(tmp_path / "outside.safetensors")
    return folder


@pytest.fixture
async def admin(folder: Path, tmp_path: Path, engine: FakeEngine) -> AsyncIterator[httpx.AsyncClient]:
    keys = key_file(tmp_path / "keys.yaml", root={"role": "admin"}, ann={"floor": "utility-priority"})
    settings = Settings(engine="fake", keys=keys, mask_dir=folder, default_level="security-critical")
    transport = httpx.ASGITransport(create_app(settings, engine))
    async with httpx.AsyncClient(
        transport=transport, base_url="http://server", headers=bearer("root")
    ) as client:
        yield client


async def test_a_good_mask_is_in_force_at_once_by_name_or_by_path(
    admin: httpx.AsyncClient, folder: Path, mask: Mask
) -> None:
    for path, old in (("good.safetensors", MASK_DIGEST), (str(folder / "good.safetensors"), mask.digest)):
        answer = await admin.post(URL, json={"path": path})
        assert answer.status_code == 200, answer.text
        told = answer.json()
        assert (told["old"], told["new"]) == (old, mask.digest)
        assert {"id": "off", "num_safety": 0, "num_utility": 0} in told["levels"]
        assert len(told["levels"]) == 1 + len(mask.levels.named)
    body = {"model": "demo", "messages": [{"role": "user", "content": "Hi"}]}
    assert (await admin.post(CHAT, json=body)).headers["X-Safety-Mask"] == mask.digest


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("no-such.safetensors", "no-such.safetensors"),
        ("none.safetensors", "safetensors"),
        ("../outside.safetensors", "not in the folder"),
        ("link.safetensors", "not in the folder"),
        ("/etc/passwd", "not in the folder"),
        (".", "cannot be put in force"),
        ("x\0y", "no path"),
        ("without.safetensors", "floor"),
        ("pipe.safetensors", "not a regular file"),
    ],
)
async def test_a_bad_mask_is_refused_with_the_reason_and_the_old_one_stays(
    admin: httpx.AsyncClient, engine: FakeEngine, path: str, words: str
) -> None:
    error = error_of(await admin.post(URL, json={"path": path}), 400, "invalid_mask")
    assert words in error["message"] and error["param"] == "path"
    assert engine.describe().mask_digest == MASK_DIGEST


async def test_only_an_admin_may(admin: httpx.AsyncClient, engine: FakeEngine) -> None:
    error_of(await admin.post(URL, content=b"unread", headers=bearer("ann")), 403, "admin_required")
    nobody = await admin.post(URL, json={"path": "good.safetensors"}, headers={"Authorization": ""})
    assert nobody.status_code == 401
    assert engine.describe().mask_digest == MASK_DIGEST


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({}, "invalid_value"),
        ({"path": 3}, "invalid_value"),
        ({"path": "a", "force": True}, "unknown_parameter"),
    ],
)
async def test_fields_are_read_strictly(admin: httpx.AsyncClient, body: dict[str, object], code: str) -> None:
    error_of(await admin.post(URL, json=body), 400, code)


async def test_every_swap_is_a_line_of_the_audit_log(
    folder: Path, tmp_path: Path, engine: FakeEngine, mask: Mask
) -> None:
    log = tmp_path / "audit.jsonl"
    keys = key_file(tmp_path / "keys.yaml", root={"role": "admin"})
    app = create_app(Settings(engine="fake", keys=keys, mask_dir=folder, audit_log=str(log)), engine)
    async with app.router.lifespan_context(app):
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(
            transport=transport, base_url="http://server", headers=bearer("root")
        ) as client:
            for name in ("good.safetensors", "none.safetensors"):
                await client.post(URL, json={"path": name})
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    swaps = [(line["what"], line["ok"]) for line in lines if line["event"] == "reload"]
    assert swaps == [("mask", True), ("mask", False)]
    assert mask.digest in lines[0]["detail"] and "none.safetensors" in lines[1]["detail"]


async def test_one_swap_ends_before_the_next_begins(folder: Path, engine: FakeEngine) -> None:
    inside, most = 0, 0

    async def use(_mask: Mask) -> EngineInfo:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        await asyncio.sleep(0)
        inside -= 1
        return engine.describe()

    swap = MaskSwap(folder, None, use, check=lambda _: None)
    await asyncio.gather(*(swap.swap("good.safetensors") for _ in range(4)))
    assert most == 1


async def test_a_reload_reads_the_file_of_the_start_and_a_failure_only_says_so(
    folder: Path, engine: FakeEngine, mask: Mask, caplog: pytest.LogCaptureFixture
) -> None:
    file = folder / "good.safetensors"
    swap = MaskSwap(folder, file, engine.use_mask, check=lambda _: None)
    file.write_bytes(b"half a")
    await swap.reload()
    assert "the old one stays in force" in caplog.text and engine.describe().mask_digest == MASK_DIGEST
    save_mask(mask, folder, "good.safetensors")
    await swap.reload()
    assert engine.describe().mask_digest == mask.digest

    other = replace(mask, metadata=mask.metadata.model_copy(update={"seeds": {"all": 7}}))
    await engine.use_mask(other)
    await swap.reload()
    assert engine.describe().mask_digest == other.digest, "the file has not changed since it was read"

    async def misfit(_mask: Mask) -> EngineInfo:
        raise MaskMismatchError("made for another model")

    await MaskSwap(folder, file, misfit, check=lambda _: None).reload()
    assert "made for another model" in caplog.text

    async def fault(_mask: Mask) -> EngineInfo:
        raise RuntimeError("nobody expected this")

    await MaskSwap(folder, file, fault, check=lambda _: None).reload()
    assert "it makes the server fail (RuntimeError)" in caplog.text
