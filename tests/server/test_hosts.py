"""Who may send requests where there are no keys: not the web pages of others. And what HTTP leaves open."""

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.app import create_app
from server.engines.fake import FakeEngine
from server.errors import SettingsError
from server.settings import Settings, read_settings
from tests.server.conftest import CHAT, error_of, listen
from tests.server.keying import bearer, key_file

pytestmark = pytest.mark.anyio
QUESTION = {"model": "demo", "messages": [{"role": "user", "content": "Hello there"}]}


def client_of(**settings: Any) -> httpx.AsyncClient:
    app = create_app(Settings(engine="fake", **settings), FakeEngine())
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost:8000")


@pytest.mark.parametrize(
    ("host", "origin", "code"),
    [
        ("localhost", None, None),
        ("LOCALHOST.:8000", None, None),
        ("127.0.0.1:8000", "http://127.0.0.1:8000", None),
        ("127.8.9.1", None, None),
        ("[::1]:8000", "http://[::1]:8000", None),
        ("localhost:8000", "http://LOCALHOST:8000", None),
        ("localhost", "https://localhost", None),
        ("evil.example:8000", None, "host_not_allowed"),
        ("evil.example:8000", "http://evil.example:8000", "host_not_allowed"),
        ("localhost.evil.example", None, "host_not_allowed"),
        ("127.0.0.1.evil.example", None, "host_not_allowed"),
        ("0.0.0.0:8000", None, "host_not_allowed"),
        ("[localhost", None, None),
        ("", None, "host_not_allowed"),
        ("localhost:8000", "http://evil.example", "origin_not_allowed"),
        ("localhost:8000", "http://localhost:3000", "origin_not_allowed"),
        ("localhost:8000", "http://127.0.0.1:8000", "origin_not_allowed"),
        ("localhost:8000", "null", "origin_not_allowed"),
        ("localhost:8000", "", "origin_not_allowed"),
    ],
)
async def test_without_keys_web_pages_of_others_are_refused(
    host: str, origin: str | None, code: str | None
) -> None:
    """With text/plain a browser asks nobody before it sends, so the answer must be no."""
    headers = {"Host": host, "Content-Type": "text/plain"} | ({} if origin is None else {"Origin": origin})
    async with client_of() as client:
        for path in ("/health", "/v1/models"):
            answer = await client.get(path, headers=headers)
            assert answer.status_code == (403 if code else 200)
        answer = await client.post(CHAT, json=QUESTION, headers=headers)
    if code is None:
        assert answer.status_code == 200
    else:
        error_of(answer, 403, code)


async def test_hosts_and_origins_that_are_named_are_let_in() -> None:
    settings = {"allowed_hosts": "box.lan,B.lan", "cors_origins": "https://app.example"}
    async with client_of(**settings) as client:
        for host in ("box.lan:8000", "b.lan", "localhost"):
            for origin in ({}, {"Origin": "https://app.example"}, {"Origin": f"http://{host}"}):
                answer = await client.post(CHAT, json=QUESTION, headers={"Host": host, **origin})
                assert answer.status_code == 200, answer.text
        stranger = await client.post(CHAT, json=QUESTION, headers={"Origin": "https://evil.example"})
        error_of(stranger, 403, "origin_not_allowed")
    async with client_of(cors_origins="*") as client:
        answer = await client.post(CHAT, json=QUESTION, headers={"Origin": "https://any.example"})
        assert answer.status_code == 200


async def test_with_keys_or_for_anyone_names_are_looked_at_only_where_they_are_set(tmp_path: Path) -> None:
    headers = {"Host": "public.example", "Origin": "https://page.example"}
    keys = key_file(tmp_path / "keys.yaml", ann={})
    for settings in ({"keys": keys}, {"open_to_anyone": True}):
        async with client_of(**settings) as client:
            answer = await client.post(CHAT, json=QUESTION, headers={**headers, **bearer("ann")})
            assert answer.status_code == 200
        async with client_of(allowed_hosts="other.example", **settings) as client:
            answer = await client.post(CHAT, json=QUESTION, headers={**headers, **bearer("ann")})
            error_of(answer, 403, "host_not_allowed")


async def test_those_who_watch_a_server_that_is_not_private_may_come_under_its_address(
    tmp_path: Path,
) -> None:
    """Probes and Prometheus ask a pod under its IP, which no setting can name before there is the pod."""
    pod, keys = {"Host": "10.1.2.3:8000"}, key_file(tmp_path / "keys.yaml", ann={})
    for settings in ({"keys": keys}, {"open_to_anyone": True}, {}):
        async with client_of(allowed_hosts="public.example", **settings) as client:
            for path in ("/health", "/ready", "/metrics"):
                answer = await client.get(path, headers={**pod, **bearer("ann")})
                if settings:
                    assert answer.status_code == 200, answer.text
                else:
                    error_of(answer, 403, "host_not_allowed")
            for path in ("/v1/models", "/health/", "/"):
                error_of(await client.get(path, headers={**pod, **bearer("ann")}), 403, "host_not_allowed")
    async with client_of(allowed_hosts="public.example", keys=keys) as client:
        error_of(await client.get("/metrics", headers=pod), 401, "missing_api_key")


@pytest.mark.parametrize("value", ["http://a", "a:80", "a b", "a/b", ","])
def test_what_is_no_name_of_a_host_is_refused(value: str) -> None:
    with pytest.raises(SettingsError, match="allowed_hosts"):
        read_settings({"engine": "fake", "allowed_hosts": value})


async def answered(port: int, request: bytes) -> bytes:
    """All that comes back until the server closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    try:
        return await asyncio.wait_for(reader.read(), 10)
    finally:
        writer.transport.abort()


async def test_a_request_that_says_twice_how_long_it_is_is_refused_and_its_connection_closed(
    engine: FakeEngine,
) -> None:
    """A proxy before this server may have gone by the other one: then what is the rest of the body here is a
    request of somebody else there."""
    head = (
        f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    smuggled = "0\r\n\r\nGET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    async with listen(Settings(engine="fake"), engine) as port:
        told = await answered(port, (head + smuggled).encode())
    assert (
        told.startswith(b"HTTP/1.1 400 ") and b'"ambiguous_length"' in told and told.count(b"HTTP/1.1") == 1
    )
    assert b"connection: close" in told.lower()


@pytest.mark.parametrize(
    ("target", "status"),
    [
        ("http://localhost/v1/safety-levels?", 200),
        ("HTTP://127.0.0.1:8000/health", 200),
        ("http://localhost", 200),
        ("http://evil.example/health", 403),
        ("http://localhost/nothing", 404),
        ("http://[::1/health", 400),
    ],
)
async def test_a_target_with_a_name_in_it_is_its_path_at_that_host(
    engine: FakeEngine, target: str, status: int
) -> None:
    """As RFC 9112 has it: servers take it, and the Host header counts for nothing beside it."""
    request = f"GET {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    async with listen(Settings(engine="fake"), engine) as port:
        told = await answered(port, request.encode())
    assert told.startswith(f"HTTP/1.1 {status} ".encode()), told[:300]
