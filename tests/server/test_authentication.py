"""Keys at the door: which routes want one, what is answered without, and what a key's holder gets."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from hypothesis import given
from hypothesis import settings as settings_of_hypothesis
from hypothesis import strategies as st
from starlette.routing import Route

from server.app import create_app, reload
from server.engines.fake import FakeEngine
from server.errors import SettingsError
from server.playground import FILES
from server.settings import Settings, read_settings
from tests.server.conftest import CHAT, error_of
from tests.server.keying import bearer, key_file, key_of
from tests.server.test_floors import ADMITTED
from tests.server.test_levels import by

pytestmark = pytest.mark.anyio

FLOORS = {f"floor-{floor}": floor for floor in ADMITTED if floor is not None}
NAMED = ("off", "utility-priority", "balanced", "security-critical", 0, 8, 9, 32, 48, 49, 63, 64, 65, 128)


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    floors = {name: {"floor": floor} for name, floor in FLOORS.items()}
    return key_file(
        tmp_path / "keys.yaml",
        plain={},
        root={"role": "admin", "floor": "off"},
        old={"expires": "2001-01-01T00:00:00+00:00"},
        elsewhere={"models": ["other"]},
        here={"models": ["other", "demo"]},
        careful={"floor": "off", "default": "security-critical"},
        **floors,
    )


@pytest.fixture
def settings(keys: Path) -> Settings:
    return Settings(engine="fake", keys=keys)


@pytest.fixture
def served(settings: Settings, engine: FakeEngine) -> FastAPI:
    return create_app(settings, engine)


@pytest.fixture
async def client(served: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(served, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        yield client


AskAs = Callable[..., Awaitable[httpx.Response]]


@pytest.fixture
def ask_as(client: httpx.AsyncClient) -> AskAs:
    """Send one chat request as somebody."""

    async def send(name: str, headers: Any = None, **fields: Any) -> httpx.Response:
        body = {"model": "demo", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1, **fields}
        return await client.post(CHAT, json=body, headers={**(headers or {}), **bearer(name)})

    return send


def routes_of(app: Any) -> list[tuple[str, str]]:
    """Every method and path that there is, those of the documentation and of included routers too."""
    found = []
    for route in app.routes:
        if inner := getattr(route, "original_router", None):
            found += routes_of(inner)
        else:
            assert isinstance(route, Route), f"{route}: a kind of route that is not tested here"
            found += [(method, route.path) for method in sorted(route.methods or ())]
    return found


OPEN = {"/health", "/ready", *FILES}


async def test_every_route_but_health_ready_and_the_files_of_the_playground_wants_a_key(
    served: FastAPI, client: httpx.AsyncClient
) -> None:
    routes = [
        *routes_of(served),
        ("GET", "/nothing"),
        ("POST", "/health/"),
        ("GET", "http://localhost//health"),
    ]
    routes += [
        ("GET", path) for path in ("/playground", "/playground/", "/playground/../v1/models", "/index.html")
    ]
    assert {path for _, path in routes} >= {CHAT, "/v1/models", "/metrics", "/docs", "/openapi.json", *OPEN}
    for method, path in routes:
        for headers in ({}, {"Authorization": "Bearer nt-wrong"}):
            response = await client.request(method, path.replace("{model_id:path}", "demo"), headers=headers)
            assert (response.status_code == 401) == (path not in OPEN), (method, path)
        response = await client.request(method, path, headers=bearer("root"))
        assert response.status_code != 401, (method, path)


async def test_metrics_need_no_key_where_that_is_set(keys: Path, engine: FakeEngine) -> None:
    app = create_app(Settings(engine="fake", keys=keys, public_metrics=True), engine)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
        assert (await client.get("/metrics")).status_code == 200
        assert (await client.get("/v1/models")).status_code == 401


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ([], "missing_api_key"),
        ([("Authorization", "")], "invalid_api_key"),
        ([("Authorization", "Bearer")], "invalid_api_key"),
        ([("Authorization", "Bearer  ")], "invalid_api_key"),
        ([("Authorization", key_of("plain"))], "invalid_api_key"),
        ([("Authorization", f"Basic {key_of('plain')}")], "invalid_api_key"),
        ([("Authorization", f"Bearer {key_of('plain')}x")], "invalid_api_key"),
        ([("Authorization", f"Bearer {key_of('plain')}, Bearer x")], "invalid_api_key"),
        ([("Authorization", f"Bearer {key_of('plain').upper()}")], "invalid_api_key"),
        ([("Authorization", b"Bearer \xff\xfe")], "invalid_api_key"),
        ([("Authorization", f"Bearer {key_of('plain')}")] * 2, "invalid_api_key"),
        ([("Authorization", f"Bearer {key_of('old')}")], "expired_api_key"),
        ([("X-Api-Key", key_of("plain"))], "missing_api_key"),
    ],
)
async def test_without_a_known_key_it_is_401(
    client: httpx.AsyncClient, headers: list[tuple[str, Any]], code: str
) -> None:
    response = await client.post(CHAT, headers=[*headers, ("X-Request-Id", "mine")], content="not even JSON")
    error_of(response, 401, code)
    assert response.headers["www-authenticate"] == "Bearer" and response.headers["x-request-id"] == "mine"
    assert key_of("plain") not in response.text


async def test_the_scheme_is_read_in_any_case(client: httpx.AsyncClient) -> None:
    for scheme in ("Bearer", "bearer", "BEARER", "Bearer "):
        headers = {"Authorization": f"{scheme} {key_of('plain')}"}
        assert (await client.get("/v1/models", headers=headers)).status_code == 200


async def test_denials_are_counted(client: httpx.AsyncClient, ask_as: AskAs) -> None:
    await client.get("/v1/models")
    await ask_as("plain", safety_level="off")
    text = (await client.get("/metrics", headers=bearer("plain"))).text
    assert 'neurontune_http_requests_total{route="/v1/models",status="401"} 1.0' in text
    assert f'neurontune_http_requests_total{{route="{CHAT}",status="403"}} 1.0' in text
    assert 'neurontune_level_denials_total{model_name="demo",reason="forbidden"} 1.0' in text


@pytest.mark.parametrize("source", ["header", "body", "suffix"])
@pytest.mark.parametrize("name", FLOORS)
async def test_a_key_gets_what_its_floor_admits_and_403_for_the_rest(
    ask_as: AskAs, name: str, source: str
) -> None:
    for value in NAMED:
        response = await ask_as(name, **by(source, value))
        if str(value) in ADMITTED[FLOORS[name]]:
            assert response.status_code == 200, (value, response.text)
            assert response.headers["x-safety-level"] == str(value)
        else:
            error = error_of(response, 403, "safety_level_forbidden")
            assert repr(str(FLOORS[name])) in error["message"] and repr(str(value)) in error["message"]
            assert (
                error["param"]
                == {"header": "X-Safety-Level", "body": "safety_level", "suffix": "model"}[source]
            )
            assert "x-safety-level" not in response.headers


async def test_streams_and_completions_are_held_to_the_floor_too(
    client: httpx.AsyncClient, ask_as: AskAs
) -> None:
    error_of(await ask_as("plain", stream=True, safety_level="off"), 403, "safety_level_forbidden")
    body = {"model": "demo@off", "prompt": "Hi"}
    response = await client.post("/v1/completions", json=body, headers=bearer("plain"))
    error_of(response, 403, "safety_level_forbidden")


async def test_sources_that_conflict_are_400_before_any_floor(ask_as: AskAs) -> None:
    response = await ask_as("plain", {"X-Safety-Level": "security-critical"}, safety_level="off")
    error_of(response, 400, "safety_level_conflict")


@pytest.mark.parametrize(
    ("name", "level"),
    [("plain", "balanced"), ("floor-security-critical", "security-critical"), ("floor-9", "9"),
     ("careful", "security-critical"), ("root", "balanced")],
)  # fmt: skip
async def test_who_names_no_level_gets_default_or_floor(ask_as: AskAs, name: str, level: str) -> None:
    assert (await ask_as(name)).headers["x-safety-level"] == level


async def test_lists_show_what_the_caller_may_ask_for(client: httpx.AsyncClient, ask_as: AskAs) -> None:
    for name, floor, default, ids in (
        ("plain", "balanced", "balanced", ["balanced", "security-critical"]),
        ("careful", "off", "security-critical", ["off", "utility-priority", "balanced", "security-critical"]),
    ):
        levels = (await client.get("/v1/safety-levels", headers=bearer(name))).json()
        assert (levels["floor"], levels["default"]) == (floor, default)
        assert [level["id"] for level in levels["data"]] == ids
        models = (await client.get("/v1/models", headers=bearer(name))).json()["data"]
        assert [model["id"] for model in models] == ["demo", *(f"demo@{each}" for each in ids)]
        for model in models:
            assert (await ask_as(name, model=model["id"])).status_code == 200
    error_of(await client.get("/v1/models/demo@off", headers=bearer("plain")), 404, "model_not_found")
    message = error_of(await ask_as("plain", model="nope"), 404, "model_not_found")["message"]
    assert "demo@balanced" in message and "demo@off" not in message


async def test_a_model_that_the_key_may_not_use_is_not_found(
    client: httpx.AsyncClient, ask_as: AskAs
) -> None:
    assert (await ask_as("here")).status_code == 200
    for model in ("demo", "demo@balanced", "other", "nope"):
        error_of(await ask_as("elsewhere", model=model), 404, "model_not_found")
    head = bearer("elsewhere")
    assert (await client.get("/v1/models", headers=head)).json()["data"] == []
    error_of(await client.get("/v1/models/demo", headers=head), 404, "model_not_found")
    for path, body in (("/tokenize", {"prompt": "Hi"}), ("/detokenize", {"tokens": [1]})):
        error_of(await client.post(path, json=body, headers=head), 404, "model_not_found")


async def test_a_reload_changes_who_may_what_and_a_broken_file_nothing(
    served: FastAPI, keys: Path, ask_as: AskAs, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        for broken in ("keys: [", "keys:\n- name: plain\n", None):
            keys.write_text(broken) if broken else key_file(keys, plain={"floor": "nope"})
            await reload(served)
            assert (await ask_as("plain", safety_level="off")).status_code == 403
        messages = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
        assert all(f"Key file {keys}" in message and "old ones stay" in message for message in messages)
        assert "line 1" in messages[0] and "line 2" in messages[1] and "'plain', floor" in messages[2]
        key_file(keys, plain={"floor": "off"})
        await reload(served)
    assert (await ask_as("plain", safety_level="off")).status_code == 200
    assert (await ask_as("root")).status_code == 401
    assert "The keys were reloaded: 1." in caplog.text and "nt-" not in caplog.text


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"floor": "nope"}, "'mobile', floor"),
        ({"default": "off"}, "'mobile', default: 'off' is not at least"),
    ],
)
def test_a_key_file_that_the_mask_does_not_fit_is_refused_at_start(
    tmp_path: Path, entry: dict[str, Any], words: str
) -> None:
    path = key_file(tmp_path / "keys.yaml", mobile=entry)
    with pytest.raises(SettingsError, match=words) as refused:
        create_app(Settings(engine="fake", keys=path), FakeEngine())
    assert str(path) in str(refused.value)


async def test_whoever_comes_to_an_open_server_is_held_to_the_default_floor(engine: FakeEngine) -> None:
    settings = Settings(engine="fake", host="0.0.0.0", open_to_anyone=True, default_floor="utility-priority")
    transport = httpx.ASGITransport(create_app(settings, engine))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        for level, status in (("off", 403), ("utility-priority", 200), ("balanced", 200)):
            body = {"model": "demo", "messages": [{"role": "user", "content": "Hi"}], "safety_level": level}
            assert (await client.post(CHAT, json=body)).status_code == status
        assert (await client.get("/v1/safety-levels")).json()["floor"] == "utility-priority"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"host": "0.0.0.0"}, "--keys"), ({"host": "::"}, "--open-to-anyone"),
        ({"host": "example.org"}, "loopback"),
        ({"keys": "k", "open_to_anyone": True}, "leave one of them out"),
        ({"default_floor": "off"}, "would bind nobody"), ({"public_metrics": True}, "everything is public"),
    ],
)  # fmt: skip
def test_settings_that_leave_the_door_open_or_do_nothing_are_refused(
    flags: dict[str, Any], words: str
) -> None:
    with pytest.raises(SettingsError) as refused:
        read_settings(flags)
    assert words in str(refused.value)


@pytest.mark.parametrize(
    "flags", [{"host": "127.0.0.2"}, {"host": "::1"}, {"host": "localhost"}, {"host": "::", "keys": "k"}]
)
def test_loopback_needs_no_keys_and_keys_may_be_anywhere(flags: dict[str, Any]) -> None:
    read_settings(flags)


async def test_a_websocket_is_closed_at_the_door(served: FastAPI) -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        await asyncio.sleep(0)
        return {"type": "websocket.connect"}

    await served({"type": "websocket", "path": "/v1/models", "headers": [], "state": {}}, receive, send)
    assert [message["type"] for message in sent] == ["websocket.close"]


levels = st.one_of(
    st.sampled_from(["off", "utility-priority", "balanced", "security-critical"]),
    st.integers(-2, 130),
    st.text(max_size=8),
)
header = levels.map(lambda value: str(value).encode("utf-8"))


@settings_of_hypothesis(max_examples=150, deadline=None)
@given(st.lists(header, max_size=2), levels | st.none() | st.floats() | st.lists(levels), st.none() | levels)
def test_no_request_at_all_is_answered_below_the_floor(
    app_of_plain: FastAPI, headers: list[bytes], body: Any, suffix: str | int | None
) -> None:
    """Through the whole application: whatever header, body and suffix say, alone or together."""
    model = "demo" if suffix is None else f"demo@{suffix}"
    content = {"model": model, "messages": [{"role": "user", "content": "Hi"}], "safety_level": body}

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app_of_plain)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            given = [(b"X-Safety-Level", value) for value in headers]
            named = [(name.encode(), value.encode()) for name, value in bearer("plain").items()]
            return await client.post(CHAT, content=json.dumps(content), headers=[*given, *named])

    response = asyncio.run(ask())
    assert response.status_code in (200, 400, 403)
    if response.status_code == 200:
        assert response.headers["x-safety-level"] in ADMITTED["balanced"]
        num_safety, num_utility = map(int, response.headers["x-safety-neurons"].split(","))
        assert num_safety >= 32 and (num_utility <= 24 or num_utility == (num_safety + 1) // 2)


@pytest.fixture(scope="module")
def app_of_plain(tmp_path_factory: pytest.TempPathFactory) -> FastAPI:
    """A server that knows `plain`, whose floor is `balanced`."""
    path = key_file(tmp_path_factory.mktemp("keys") / "keys.yaml", plain={})
    return create_app(Settings(engine="fake", keys=path), FakeEngine())
