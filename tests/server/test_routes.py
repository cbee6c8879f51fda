"""Health, readiness, and what is answered where there is no route."""

import json

import httpx
import pytest

from server.engines.fake import FakeEngine
from server.errors import ERRORS, error_body, kind_of
from tests.server.conftest import CHAT, error_of

pytestmark = pytest.mark.anyio


async def test_health_is_of_the_process_and_ready_is_of_the_engine(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    assert (await client.get("/ready")).json() == {"status": "ready"}
    engine.set_unready("It is being rebuilt.")
    assert "rebuilt" in error_of(await client.get("/ready"), 503, "engine_unavailable")["message"]
    assert (await client.get("/health")).status_code == 200
    engine.set_unready("")
    assert (await client.get("/ready")).status_code == 200


async def test_no_route_and_no_method_are_errors_in_openais_shape(client: httpx.AsyncClient) -> None:
    assert "/v1/nothing" in error_of(await client.get("/v1/nothing"), 404, "route_not_found")["message"]
    error_of(await client.get("/v1/models/"), 404, "route_not_found")
    response = await client.get(CHAT)
    error_of(response, 405, "method_not_allowed")
    assert response.headers["allow"] == "POST"


async def test_the_openapi_document_describes_the_request(client: httpx.AsyncClient) -> None:
    document = (await client.get("/openapi.json")).json()
    body = document["paths"][CHAT]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert {"model", "messages", "safety_level", "temperature"} <= set(body["properties"])
    assert body["additionalProperties"] is False
    assert "$ref" not in json.dumps(body), "a reference would lead nowhere in the document"


def test_an_error_is_answered_as_its_nearest_class() -> None:
    for kind, entry in ERRORS.items():
        derived = type("Derived", (kind,), {})
        assert kind_of(derived("text")) is entry
        assert 400 <= entry.status < 600
        assert (entry.type == "server_error") == (entry.status >= 500)


def test_an_error_that_is_not_ours_says_nothing_of_itself() -> None:
    assert "secret" not in str(error_body(ValueError("secret")))
