"""Folders that are written whole or not at all.

Knows files, and a card's front matter: what is replaced must be an export. Knows nothing else of what is
in them.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

from modulation.errors import ExportError
from modulation.export.card import MARK

CARD = "README.md"


def refuse_existing(folder: Path, *, force: bool) -> None:
    """Raise ExportError where `folder` cannot be written: it is there, or its own folder is not."""
    if folder.parent.exists() and not folder.parent.is_dir():
        raise ExportError(f"{folder} cannot be written: {folder.parent} is not a folder.")
    if not os.path.lexists(folder):
        return
    if not force:
        raise ExportError(f"{folder} exists. Name another --out, or replace it with --force.")
    if folder.is_symlink() or not folder.is_dir():
        raise ExportError(f"{folder} is not a folder; --force replaces only what an export has written.")
    if any(folder.iterdir()) and not _is_export(folder):
        raise ExportError(f"{folder} holds something else than an export, so --force does not replace it.")


@contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """A new folder to write into, which becomes `folder` when the block ends well, in place of an older one.

    Raises ExportError where it cannot be.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".partial", dir=folder.parent))
    except OSError as error:
        raise ExportError(f"{folder} cannot be written: {error.strerror}.") from error
    try:
        yield partial
        partial.chmod(0o755)
        for (
            each
        ) in partial.iterdir():  # weights are written for their owner's eyes alone; a server is another user
            each.chmod(0o644)
        _replace(folder, partial)
    except OSError as error:
        raise ExportError(f"{folder} cannot be written: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _replace(folder: Path, by: Path) -> None:
    if not folder.exists():
        by.rename(folder)
        return
    # Two renames: between them nothing is there, never something that is half of each.
    old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".old", dir=folder.parent))
    folder.rename(old)
    try:
        by.rename(folder)
    except OSError:
        old.rename(folder)
        raise
    shutil.rmtree(old)


def _is_export(folder: Path) -> bool:
    try:
        _, front, _ = (folder / CARD).read_text().split("---\n", 2)
        return MARK in yaml.safe_load(front)
    except (OSError, ValueError, TypeError, yaml.YAMLError):
        return False
