"""docs/access.md and the code say the same: the fields of a key, the example, the table of the order."""

import re
from pathlib import Path

from server.access import admits
from server.audit import Entry as AuditEntry
from server.audit import record, reload_record
from server.audit_log import BURST_SECONDS, CAPACITY, CLOSE_SECONDS
from server.callers import Caller
from server.engines.fake import LEVELS
from server.keys import Entry, parse_entries
from server.redaction import MAX_CHARACTERS

PAGE = (Path(__file__).parent.parent.parent / "docs" / "access.md").read_text()


def test_the_fields_of_a_key() -> None:
    section = PAGE.partition("## The key file")[2].partition("\n## ")[0]
    assert re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE) == list(Entry.model_fields)


def test_the_example_is_a_key_file() -> None:
    (example,) = re.findall(r"^```yaml\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    entries = parse_entries(example, Path("keys.yaml"))
    assert [(entry.name, entry.role) for entry in entries] == [("mobile", "user"), ("operator", "admin")]


def test_the_table_of_the_order_is_what_the_fake_engine_does() -> None:
    caller = Caller("mobile", floor="balanced")
    for number in range(129):
        admitted = admits(LEVELS, caller, LEVELS.parse(number))
        assert admitted == (number >= 32)
    for words in ("| 31 |", "| 32 to 48 |", "| 49 and more |"):
        assert words in PAGE


def test_the_fields_of_the_audit_log() -> None:
    section = PAGE.partition("## The audit log")[2]
    documented = re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)
    scope = {"method": "GET", "path": "/"}
    assert sorted(documented) == sorted(record(scope, AuditEntry(keeps_prompt=True), "", 200, 0.0))
    (said,) = re.findall(r"A reload's line has (.*?):", section)
    assert re.findall(r"`(\w+)`", said.replace("(`keys` or `mask`)", "")) == list(reload_record("keys", None))


def test_figures() -> None:
    assert (MAX_CHARACTERS, CAPACITY, BURST_SECONDS, CLOSE_SECONDS) == (4096, 10_000, 60, 5)
    for words in ("4096 characters", "10,000 lines", "less than a minute apart", "five\nseconds"):
        assert words in PAGE
