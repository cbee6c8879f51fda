"""`POST /admin/mask` and SIGHUP: a mask that fits is in force at once, any other changes nothing."""

import asyncio
import json
import os
import threading
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI

from modulation.errors import MaskMismatchError
from modulation.masks import Mask
from server.app import create_app, reload
from server.engines.base import EngineInfo
from server.engines.fake import MASK_DIGEST, FakeEngine
from server.errors import InvalidMaskError, SettingsError
from server.keys import Keyring, Keys
from server.mask_swap import MaskSwap, Swap, UseMask
from server.settings import Settings
from tests.engines.contract import until
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
        transport=transport, base_url="http://localhost", headers=bearer("root")
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


async def test_every_swap_is_a_line_of_the_audit_log_that_says_who_and_what(
    folder: Path, tmp_path: Path, engine: FakeEngine, mask: Mask
) -> None:
    """Refused ones too: a path outside of the folder, and a fault of the server."""
    log = tmp_path / "audit.jsonl"
    keys = key_file(tmp_path / "keys.yaml", root={"role": "admin"})
    app = create_app(Settings(engine="fake", keys=keys, mask_dir=folder, audit_log=str(log)), engine)
    paths = ["good.safetensors", "none.safetensors", "../outside.safetensors", "without.safetensors"]
    async with app.router.lifespan_context(app):
        transport = httpx.ASGITransport(app, client=("192.0.2.7", 5000))
        async with httpx.AsyncClient(
            transport=transport, base_url="http://localhost", headers=bearer("root")
        ) as client:
            for number, path in enumerate(paths):
                await client.post(URL, json={"path": path}, headers={"X-Request-Id": f"swap-{number}"})
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    said = [(line["event"], line["what"], line["key"], line["client"], line["old"]) for line in lines]
    digests = [MASK_DIGEST, mask.digest, mask.digest, mask.digest]
    assert said == [("reload", "mask", "root", "192.0.2.7", old) for old in digests]
    assert [line["request_id"] for line in lines] == [f"swap-{number}" for number in range(4)]
    assert [line["ok"] for line in lines] == [True, False, False, True]
    assert [line["new"] for line in lines[:3]] == [mask.digest, None, None]
    assert lines[3]["new"] not in digests
    assert mask.digest in lines[0]["detail"] and "good.safetensors" in lines[0]["detail"]
    assert "none.safetensors" in lines[1]["detail"] and "not in the folder" in lines[2]["detail"]


async def test_a_swap_that_nobody_waits_for_to_the_end_is_told_of_too(folder: Path) -> None:
    told: list[Swap] = []

    async def use(_mask: Mask) -> EngineInfo:
        await asyncio.Event().wait()
        raise AssertionError("never")

    swap = MaskSwap(folder, None, use, lambda _: None, lambda: MASK_DIGEST, told.append)
    swapping = asyncio.create_task(swap.swap("good.safetensors", "ann"))
    await until(lambda: swap.changing.locked())
    swapping.cancel()
    await asyncio.wait({swapping})
    assert [(each.by, type(each.error)) for each in told] == [("ann", asyncio.CancelledError)]


@pytest.fixture
def both(folder: Path, tmp_path: Path, engine: FakeEngine) -> tuple[FastAPI, Path, Path]:
    """A server with a key file and a mask file that SIGHUP reads, and both files."""
    keys, file = (
        key_file(tmp_path / "keys.yaml", old={"floor": "utility-priority"}),
        folder / "good.safetensors",
    )
    app = create_app(Settings(engine="fake", keys=keys, mask_dir=folder), engine)
    app.state.reloading._swap._file = file  # the fake engine has none
    return app, keys, file


def names(app: FastAPI) -> list[str]:
    return [caller.name for caller in app.state.callers()]


async def test_keys_and_a_mask_that_fit_only_together_are_put_in_force_together(
    both: tuple[FastAPI, Path, Path], engine: FakeEngine, mask: Mask
) -> None:
    """The new keys name a level that only the new mask has, and the new mask lacks one of the old keys'."""
    app, keys, file = both
    levels = {"security-critical": (40, 20), "balanced": (20, 6), "strict": (30, 9)}
    new = replace(mask, metadata=mask.metadata.model_copy(update={"levels": levels}))
    new.save(file)
    seen: list[tuple[str, list[str]]] = []
    key_file(keys, new={"floor": "strict"})
    use = app.state.reloading._swap._use

    async def watched(mask: Mask) -> EngineInfo:
        seen.append((engine.describe().mask_digest, names(app)))
        return await use(mask)

    app.state.reloading._swap._use = watched
    await reload(app)
    assert seen == [(MASK_DIGEST, ["old"])]
    assert engine.describe().mask_digest == new.digest and names(app) == ["new"]


async def test_where_the_mask_cannot_be_used_keys_that_need_it_are_not_used_either(
    both: tuple[FastAPI, Path, Path], engine: FakeEngine, mask: Mask, caplog: pytest.LogCaptureFixture
) -> None:
    app, keys, file = both
    levels = {"security-critical": (40, 20), "balanced": (20, 6), "strict": (30, 9)}
    replace(mask, metadata=mask.metadata.model_copy(update={"levels": levels})).save(file)
    key_file(keys, new={"floor": "strict"})

    def misfit(_mask: Mask) -> None:
        raise MaskMismatchError("made for another model")

    engine._check_mask = misfit  # type: ignore[misc]
    await reload(app)
    assert engine.describe().mask_digest == MASK_DIGEST and names(app) == ["old"]
    assert "made for another model" in caplog.text and "'new', floor" in caplog.text


async def test_a_mask_that_cannot_be_used_keeps_no_key_alive_that_was_revoked(
    both: tuple[FastAPI, Path, Path], engine: FakeEngine, mask: Mask
) -> None:
    app, keys, file = both
    save_mask(mask, file.parent, "good.safetensors")
    for floor, content in (("balanced", b"half a"), ("off", file.read_bytes())):
        key_file(keys, **{f"only-{floor}": {"floor": floor}})
        file.write_bytes(content)
        await reload(app)
        assert names(app) == [f"only-{floor}"]
    assert engine.describe().mask_digest == mask.digest


async def test_no_mask_is_put_in_force_while_keys_are_read(
    both: tuple[FastAPI, Path, Path], engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The keys were checked against the mask in force, then another came: their floors meant nothing."""
    app, keys, _ = both
    key_file(keys, new={"floor": "utility-priority"})
    reading, go = threading.Event(), threading.Event()
    read = Keyring.read

    def slow(keyring: Keyring) -> Keys:
        reading.set()
        assert go.wait(30)
        return read(keyring)

    monkeypatch.setattr(Keyring, "read", slow)
    app.state.reloading._swap._file = None
    reloading = asyncio.create_task(reload(app))
    await until(reading.is_set)
    swapping = asyncio.create_task(app.state.reloading._swap.swap("without.safetensors"))
    await asyncio.sleep(0)
    go.set()
    await reloading
    with pytest.raises(InvalidMaskError, match="'new', floor"):
        await swapping
    assert names(app) == ["new"] and engine.describe().mask_digest == MASK_DIGEST


def test_a_folder_of_masks_that_is_not_there_is_refused_at_start(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"mask_dir: .*/none is no folder"):
        create_app(Settings(engine="fake", mask_dir=tmp_path / "none"), FakeEngine())


async def test_one_swap_ends_before_the_next_begins(folder: Path, engine: FakeEngine) -> None:
    inside, most = 0, 0

    async def use(_mask: Mask) -> EngineInfo:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        await asyncio.sleep(0)
        inside -= 1
        return engine.describe()

    swap = MaskSwap(folder, None, use, lambda _: None, lambda: MASK_DIGEST)
    await asyncio.gather(*(swap.swap("good.safetensors") for _ in range(4)))
    assert most == 1


async def test_a_reload_reads_the_file_of_the_start_and_a_failure_only_says_so(
    folder: Path, engine: FakeEngine, mask: Mask, caplog: pytest.LogCaptureFixture
) -> None:
    file = folder / "good.safetensors"

    def swap_of(use: UseMask) -> MaskSwap:
        return MaskSwap(folder, file, use, lambda _: None, lambda: engine.describe().mask_digest)

    swap = swap_of(engine.use_mask)
    file.write_bytes(b"half a")
    assert await swap.read_again() is None
    assert "the old one stays in force" in caplog.text and engine.describe().mask_digest == MASK_DIGEST
    save_mask(mask, folder, "good.safetensors")
    read = await swap.read_again()
    assert read is not None and await swap.reload(read)
    assert engine.describe().mask_digest == mask.digest

    other = replace(mask, metadata=mask.metadata.model_copy(update={"seeds": {"all": 7}}))
    await engine.use_mask(other)
    assert await swap.read_again() is None, "the file has not changed since it was read"
    assert engine.describe().mask_digest == other.digest

    async def misfit(_mask: Mask) -> EngineInfo:
        raise MaskMismatchError("made for another model")

    async def fault(_mask: Mask) -> EngineInfo:
        raise RuntimeError("nobody expected this")

    assert not await swap_of(misfit).reload(mask) and "made for another model" in caplog.text
    assert not await swap_of(fault).reload(mask) and "it makes the server fail (RuntimeError)" in caplog.text
