"""Schemathesis makes requests up from the OpenAPI document: nothing fails, and nothing is undocumented."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from server.app import create_app
from server.engines.fake import FakeEngine
from server.settings import Settings
from tests.clients.conftest import serving
from tests.server.keying import bearer, key_file

ROOT = Path(__file__).parent.parent.parent
CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,"
    "response_headers_conformance,response_schema_conformance"
)


@pytest.mark.parametrize("key", [None, "mobile", "nobody"], ids=["open", "key", "no key"])
def test_requests_that_are_made_up_are_answered_as_the_document_says(key: str | None, tmp_path: Path) -> None:
    command = [str(Path(sys.executable).parent / "schemathesis"), "run", "--no-color", "--checks", CHECKS]
    command += ["--phases", "examples,fuzzing", "--max-examples", "25", "--seed", "1"]
    command += ["--generation-database", "none", "--request-timeout", "20"]
    document = tmp_path / "openapi.json"
    document.write_text(json.dumps(create_app(Settings(), FakeEngine()).openapi()))
    settings: dict[str, Any] = {}
    if key is not None:
        settings["keys"] = key_file(tmp_path / "keys.yaml", mobile={}, root={"floor": "off"})
    if key == "mobile":
        command += ["--header", f"Authorization: {bearer(key)['Authorization']}"]
    with serving(FakeEngine(), **settings) as address:
        done = subprocess.run(
            [*command, "--url", address, str(document)],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env=os.environ | {"SCHEMATHESIS_HOOKS": "tests.clients.fuzzing"},
        )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
