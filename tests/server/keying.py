"""Key files for tests: entries by name, their keys beside them."""

from pathlib import Path
from typing import Any

import yaml

from server.keys import hash_of


def key_of(name: str) -> str:
    """The key that `key_file` gives to a name."""
    return f"nt-the-key-of-{name}"


def bearer(name: str) -> dict[str, str]:
    """The header of a request that `name` sends."""
    return {"Authorization": f"Bearer {key_of(name)}"}


def key_file(path: Path, **entries: dict[str, Any]) -> Path:
    """Write a key file with these names and the further fields of each."""
    keys = [{"name": name, "hash": hash_of(key_of(name).encode()), **more} for name, more in entries.items()]
    path.write_text(yaml.safe_dump({"keys": keys}))
    return path
