"""Where figures come from, in words: prompts, model, mask, judge, command, versions.

Knows what a reader needs to make the figures again. Knows nothing of the figures.
"""

import hashlib
import platform
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from modulation.evaluation.answer_file import data_digest
from modulation.evaluation.prompts import Prompts
from modulation.evaluation.sources import Source

PACKAGES = ("neurontune", "torch", "transformers")


def provenance(data: Path, prompts: Prompts, source: Source, judge: str, command: str) -> dict[str, str]:
    """The same run has the same provenance: no date is in it."""
    return {
        "model": str(source.run["model"]),
        "mask": str(source.run["mask"] or "not told by the server"),
        "data": _named(data, prompts),
        "prompts": prompts.told,
        "judge": judge,
        "answers": source.told,
        "command": command,
        "versions": versions(),
    }


def _named(data: Path, prompts: Prompts) -> str:
    """The file and its digest as `sha256sum` prints it; what is no file, a pipe, can be read only once."""
    if not data.is_file():
        return f"{data.name}, no file, digest of its prompts {data_digest(prompts.records)}"
    return f"{data.name}, SHA-256 {hashlib.sha256(data.read_bytes()).hexdigest()}"


def dated(run: dict[str, str]) -> dict[str, str]:
    """With today's date, UTC."""
    return {**run, "date": datetime.now(UTC).date().isoformat()}


def versions() -> str:
    """Of Python and of what computes the figures."""
    return ", ".join([f"Python {platform.python_version()}", *map(_version, PACKAGES)])


def _version(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:  # run from a source tree
        return f"{package} (not installed)"
