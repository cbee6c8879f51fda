"""`neurontune keys`: add a key to a key file, list a file's keys, remove one.

Knows the file and how it is rewritten whole, under a lock. A new key is printed once and kept nowhere.
"""

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Final

import typer
import yaml
from pydantic import ValidationError

from server.errors import SettingsError
from server.keys import Entry, compose, hash_of, new_key, now, parse_entries, read_entries, read_text

EMPTY: Final = "keys: []\n"
HEAD: Final = "keys:\n"

app = typer.Typer(name="keys", help="The keys of a key file: add, list, remove.", no_args_is_help=True)

File = Annotated[Path, typer.Option("--file", help="The key file.", show_default=False)]


@app.command()
def add(
    file: File,
    name: Annotated[str, typer.Option(help="The new key's name, in the file and the audit log.")],
    floor: Annotated[
        str | None, typer.Option(help="Least safe level it may ask for. Left out: the setting default_floor.")
    ] = None,
    default: Annotated[str | None, typer.Option(help="Level of its requests that name none.")] = None,
    model: Annotated[list[str] | None, typer.Option(help="A model it may ask for; may be repeated.")] = None,
    requests_per_minute: Annotated[str | None, typer.Option(help="Most requests in a minute.")] = None,
    tokens_per_minute: Annotated[str | None, typer.Option(help="Most tokens in a minute.")] = None,
    expires: Annotated[str | None, typer.Option(help="When it ends: 2027-01-31T00:00:00Z.")] = None,
    role: Annotated[str | None, typer.Option(help="user or admin. Left out: user.")] = None,
) -> None:
    """Make a key, put its hash into the file, and print it: alone on the last line, once."""
    key = new_key()
    given = {
        "name": name,
        "hash": hash_of(key.encode()),
        "role": role,
        "floor": floor,
        "default": default,
        "models": model or None,
        "requests_per_minute": requests_per_minute,
        "tokens_per_minute": tokens_per_minute,
        "expires": expires,
    }
    entry = _checked({field: value for field, value in given.items() if value is not None})
    with _locked(file):
        text = read_text(file) if file.exists() else EMPTY
        before = parse_entries(text, file)
        if any(entry.name == each.name for each in before):
            raise SettingsError(
                f"Key file {file} has a key {name!r}. Choose another name, or remove it first."
            )
        expected = (*before, entry)
        _write(file, _kept(text.rstrip("\n") + "\n" + _as_yaml([entry]), expected, file))
    typer.echo(
        f"Added {name!r} to {file}. A running server reads it on SIGHUP. The key, shown only now:", err=True
    )
    typer.echo(key)


@app.command("list")
def show(file: File) -> None:
    """Print the keys of the file: names and what they may, no key and no hash."""
    for entry in read_entries(file):
        said = [
            f"{field} {', '.join(value) if isinstance(value, list) else value}"
            for field, value in _fields(entry).items()
            if field not in ("name", "hash")
        ]
        ended = entry.expires is not None and now() >= entry.expires
        typer.echo("  ".join([entry.name, *said, *(["EXPIRED"] if ended else [])]))


@app.command()
def remove(
    file: File,
    name: Annotated[str, typer.Option(help="The name of the key that goes.")],
) -> None:
    """Remove a key from the file. A running server goes on taking it until SIGHUP."""
    with _locked(file):
        text = read_text(file)
        before = parse_entries(text, file)
        names = [entry.name for entry in before]
        if name not in names:
            raise SettingsError(f"Key file {file} has no key {name!r}. It has: {', '.join(names) or 'none'}.")
        expected = tuple(entry for entry in before if entry.name != name)
        _write(file, _kept(_without(text, names.index(name)), expected, file))
    typer.echo(f"Removed {name!r} from {file}. A running server takes it until SIGHUP.", err=True)


def _checked(fields: dict[str, Any]) -> Entry:
    try:
        return Entry.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        said = first["msg"].removeprefix("Value error, ").replace("Input should", "should")
        flag = "--model" if first["loc"][0] == "models" else f"--{str(first['loc'][0]).replace('_', '-')}"
        raise SettingsError(f"{flag}: {said}, not {first['input']!r}.") from error


def _fields(entry: Entry) -> dict[str, Any]:
    """What the file says of a key, in the order of its fields."""
    fields: dict[str, Any] = entry.model_dump(exclude_none=True, exclude_defaults=True)
    if entry.models is not None:
        fields["models"] = list(entry.models)
    if entry.expires is not None:
        fields["expires"] = entry.expires.isoformat()
    return fields


def _as_yaml(entries: list[Entry]) -> str:
    return str(yaml.safe_dump([_fields(entry) for entry in entries], sort_keys=False))


def _kept(text: str, expected: tuple[Entry, ...], file: Path) -> str:
    """`text`, an edited key file with its comments, if it means `expected`; else these, written anew.

    Raises:
        SettingsError: they cannot be together in one file.
    """
    try:
        if parse_entries(text, file) == expected:
            return text
    except SettingsError:
        pass
    anew = HEAD + _as_yaml(list(expected)) if expected else EMPTY
    read = parse_entries(anew, file)
    assert read == expected, (read, expected)
    return anew


def _without(text: str, index: int) -> str:
    """The text of a key file without the lines of one entry."""
    root = compose(text)
    assert isinstance(root, yaml.MappingNode), root
    nodes = root.value[0][1].value
    lines = text.splitlines(keepends=True)
    first = nodes[index].start_mark.line
    after = nodes[index + 1].start_mark.line if index + 1 < len(nodes) else len(lines)
    return "".join(lines[:first] + lines[after:])


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Two commands at once come one after the other: the lock is on the folder."""
    try:
        folder = os.open(file.resolve().parent, os.O_RDONLY)
    except OSError as error:
        raise SettingsError(f"Key file {file} cannot be written: {error.strerror}.") from error
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def _write(file: Path, text: str) -> None:
    """Replace the file whole. Only its owner may read it."""
    target = file.resolve()
    try:
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=target.parent, delete=False) as partial:
            partial.write(text)
            partial.flush()
            os.fsync(partial.fileno())
        os.replace(partial.name, target)
    except OSError as error:
        raise SettingsError(f"Key file {file} cannot be written: {error.strerror}.") from error
