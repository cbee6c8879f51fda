"""Flags that several commands share: their values, and what is refused before anything slow begins.

Knows command lines. Knows nothing of what is done with them.
"""

import shlex
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import typer

from modulation.errors import DataError, LevelError

Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]


def refuse_unwritable(
    files: Mapping[str, Path | None], reads: Mapping[str, Path | None] = MappingProxyType({})
) -> None:
    """Raise DataError for a file to be written that is a folder, whose folder is not there, or that another
    flag writes, or reads: what somebody wrote is never written over. Both are by flag."""
    seen = {path.resolve(): flag for flag, path in reads.items() if path is not None}
    for flag, path in files.items():
        if path is None:
            continue
        if not path.parent.is_dir():
            raise DataError(f"{flag} {path}: the folder {path.parent} does not exist.")
        if path.is_dir():
            raise DataError(f"{flag} {path} is a folder; a file is needed.")
        if path.resolve() in seen:
            raise DataError(f"{flag} {path} is the file of {seen[path.resolve()]} too; name another one.")
        seen[path.resolve()] = flag


def parse_levels(text: str) -> tuple[str, ...]:
    """Names and numbers separated by commas; an empty text means none. Raises LevelError."""
    names = tuple(name.strip() for name in text.split(",")) if text else ()
    if "" in names:
        raise LevelError(f"--levels {text!r} has an empty name.")
    if len(set(names)) < len(names):
        raise LevelError(f"--levels {text!r} names a level twice.")
    return names


def command_line(context: typer.Context) -> str:
    """The command that runs, as it can be typed again: every flag that is not at its default."""
    words = ["neurontune", str(context.info_name)]
    for parameter in context.command.params:
        value: Any = context.params.get(str(parameter.name))
        if value is not None and value != parameter.get_default(context):
            words += [parameter.opts[-1], str(value)]
    return shlex.join(words)
