"""The files of the playground: served as they are, to anybody, under a policy that they keep themselves."""

import re
from pathlib import Path

import httpx
import pytest

from server.app import create_app
from server.engines.fake import FakeEngine
from server.playground import CONTENT_SECURITY_POLICY, FILES, FOLDER
from server.settings import Settings
from tests.server.conftest import error_of
from tests.server.keying import key_file

pytestmark = pytest.mark.anyio


async def test_every_file_is_served_without_a_key_and_nothing_else_is(tmp_path: Path) -> None:
    keys = key_file(tmp_path / "keys.yaml", somebody={})
    transport = httpx.ASGITransport(create_app(Settings(engine="fake", keys=keys), FakeEngine()))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        assert set(FILES.values()) == set(FOLDER.iterdir()), "a file of a kind that is not served"
        for path, file in FILES.items():
            answer = await client.get(path)
            assert answer.status_code == 200 and answer.content == file.read_bytes()
            assert answer.headers["content-security-policy"] == CONTENT_SECURITY_POLICY
            again = await client.get(path, headers={"If-None-Match": answer.headers["etag"]})
            assert again.status_code == 304 and not again.content
        for path in ("/playground", "/playground/", "/playground/index.html", "/playground/__init__.py"):
            error_of(await client.get(path), 401, "missing_api_key")


def test_the_page_loads_nothing_from_elsewhere() -> None:
    for file in FILES.values():
        text = file.read_text().replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?:|//cdn|\bimport\(|innerHTML|\beval\(", text), file.name
        if file.suffix == ".html":
            assert not re.search(r"\s(style|on\w+)=|<style|<script(?![^>]*\ssrc=)", text), "an inline part"
        for target in re.findall(r'(?:from|src=|href=)\s*"([^"#]+)"', text):
            assert f"/playground/{target.removeprefix('./').removeprefix('/playground/')}" in FILES, target
    assert "default-src 'self'" in CONTENT_SECURITY_POLICY and "unsafe" not in CONTENT_SECURITY_POLICY
