"""What a caller is told of the mask: counts by layer and recorded rates, of levels that they may ask for."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from modulation.demo import MASK_FILE
from modulation.levels import Threshold
from modulation.masks import Mask
from server.app import create_app
from server.engines.fake import FakeEngine
from server.settings import Settings
from tests.server.conftest import CHAT, error_of
from tests.server.keying import bearer, key_file

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def mask() -> Mask:
    return Mask.load(MASK_FILE)


@pytest.fixture
async def client(tmp_path: Path, mask: Mask) -> AsyncIterator[httpx.AsyncClient]:
    keys = key_file(
        tmp_path / "keys.yaml", free={"floor": "off"}, bound={"floor": "balanced"}, by_number={"floor": 30}
    )
    engine = FakeEngine()
    await engine.use_mask(mask)
    transport = httpx.ASGITransport(create_app(Settings(engine="fake", keys=keys), engine))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        yield client


async def told(client: httpx.AsyncClient, name: str, level: str | None = None) -> Any:
    response = await client.get(
        "/v1/mask", params={} if level is None else {"safety_level": level}, headers=bearer(name)
    )
    assert response.status_code == 200, response.text
    return response.json()


@pytest.mark.parametrize("level", [None, "off", "balanced", "security-critical", "7", "33"])
async def test_active_neurons_are_counted_by_layer(
    client: httpx.AsyncClient, mask: Mask, level: str | None
) -> None:
    body = await told(client, "free", level)
    threshold = mask.levels.parse(level or "balanced").threshold
    assert body["mask"] == mask.digest
    assert body["level"] == {
        "id": level or "balanced",
        "num_safety": threshold.num_safety,
        "num_utility": threshold.num_utility,
    }
    for kind, neurons, number in (
        ("safety", mask.safety, threshold.num_safety), ("utility", mask.utility, threshold.num_utility),
    ):  # fmt: skip
        layers, shown = neurons.neurons[:, 0], body["neurons"][kind]
        for given, expected in (("per_layer", layers), ("active_per_layer", layers[:number])):
            assert shown[given] == np.bincount(expected, minlength=mask.metadata.num_layers).tolist()
        assert shown["factors"] == {"min": neurons.factors.min(), "max": neurons.factors.max()}
        assert sorted(shown) == ["active_per_layer", "factors", "per_layer"], "nothing that names a neuron"


async def test_the_recorded_evaluation_is_told(client: httpx.AsyncClient, mask: Mask) -> None:
    evaluation = (await told(client, "free"))["evaluation"]
    recorded = mask.metadata.evaluation["levels"]
    assert {each["id"]: each["rates"]["asr"]["rate"] for each in evaluation["levels"]} == {
        name: recorded[name]["asr"]["rate"] for name in mask.levels.names
    }
    assert len(evaluation["curve"]) == len(mask.metadata.evaluation["curve"])


async def test_a_floor_hides_the_levels_below_it(client: httpx.AsyncClient, mask: Mask) -> None:
    for level in ("off", "utility-priority", "0"):
        response = await client.get("/v1/mask", params={"safety_level": level}, headers=bearer("bound"))
        assert error_of(response, 403, "safety_level_forbidden")["param"] == "safety_level"
    evaluation = (await told(client, "bound"))["evaluation"]
    assert {each["id"] for each in evaluation["levels"]} == {"balanced", "security-critical"}
    floor = mask.levels.parse("balanced").threshold
    shown = [Threshold(each["num_safety"], each["num_utility"]) for each in evaluation["curve"]]
    assert shown and all(mask.levels.at_least_as_safe(each, floor) for each in shown)


async def test_the_numbers_told_are_exactly_those_that_are_granted(
    client: httpx.AsyncClient, mask: Mask
) -> None:
    for name in ("free", "bound", "by_number"):
        level = str(mask.levels.largest_number)
        numbers = (await told(client, name, level))["numbers"]
        for number in range(mask.levels.largest_number + 3):
            params = {"safety_level": str(number)}
            status = (await client.get("/v1/mask", params=params, headers=bearer(name))).status_code
            assert (status == 200) == (numbers["min"] <= number <= numbers["max"]), (name, number)


async def test_what_the_route_cannot_read_is_refused(client: httpx.AsyncClient) -> None:
    for query, code in (
        ("safety_level=nope", "invalid_safety_level"), ("safety_level=39", "invalid_safety_level"),
        ("safety_level=", "invalid_safety_level"), ("level=off", "unknown_parameter"),
        ("safety_level=off&safety_level=3", "safety_level_conflict"),
    ):  # fmt: skip
        error_of(await client.get(f"/v1/mask?{query}", headers=bearer("free")), 400, code)
    error_of(await client.get("/v1/mask"), 401, "missing_api_key")


async def test_an_engine_without_a_mask_has_nothing_to_tell() -> None:
    transport = httpx.ASGITransport(create_app(Settings(engine="fake"), FakeEngine()))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        body = (await client.get("/v1/mask")).json()
    assert (
        body["neurons"] is None and body["evaluation"] is None and body["numbers"] == {"min": 0, "max": 128}
    )


async def test_the_level_mix_counts_what_everybody_was_given(client: httpx.AsyncClient) -> None:
    body = {"model": "demo", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
    for level in ("off", "off", 3, 4, None):
        await client.post(CHAT, json={**body, "safety_level": level}, headers=bearer("free"))
    await client.post(CHAT, json={**body, "safety_level": "off"}, headers=bearer("bound"))  # refused
    mix = (await client.get("/v1/level-mix", headers=bearer("bound"))).json()
    assert {each["id"]: each["num_requests"] for each in mix["data"]} == {
        "balanced": 1,
        "custom": 2,
        "off": 2,
    }
    assert (mix["num_running"], mix["num_waiting"]) == (0, 0)
    error_of(await client.get("/v1/level-mix"), 401, "missing_api_key")
