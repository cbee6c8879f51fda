"""docs/access.md and the code say the same: the fields of the key file, its example, and the order's table."""

import re
from pathlib import Path

from server.access import admits
from server.callers import Caller
from server.engines.fake import LEVELS
from server.keys import Entry, parse_entries

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
        assert admitted == (32 <= number <= 48 or number == 64)
    for words in ("| 31 |", "| 32 to 48 |", "| 49 to 63 |", "| 64 |", "| 65 and more |"):
        assert words in PAGE
