"""Schemathesis makes requests up from the OpenAPI document: nothing fails, and nothing is undocumented."""

import os
import subprocess
import sys
from pathlib import Path

from server.engines.fake import FakeEngine
from tests.clients.conftest import serving

ROOT = Path(__file__).parent.parent.parent
CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,"
    "response_headers_conformance,response_schema_conformance"
)


def test_requests_that_are_made_up_are_answered_as_the_document_says() -> None:
    command = [str(Path(sys.executable).parent / "schemathesis"), "run", "--no-color", "--checks", CHECKS]
    command += ["--phases", "examples,fuzzing", "--max-examples", "25", "--seed", "1"]
    command += ["--generation-database", "none", "--request-timeout", "20"]
    with serving(FakeEngine()) as address:
        done = subprocess.run(
            [*command, f"{address}/openapi.json"],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env=os.environ | {"SCHEMATHESIS_HOOKS": "tests.clients.fuzzing"},
        )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
