"""The key file: whose keys the server knows, and what each caller may do.

Knows YAML, hashes of keys and callers. Knows no HTTP, no settings, no level's meaning. A key is 32 random
bytes, so one SHA-256 hides it: what makes passwords need a slow hash, that they can be guessed, it has not.
"""

import hashlib
import hmac
import re
import secrets
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, ValidationError

from modulation.files import read_regular
from server.callers import ANONYMOUS, Caller
from server.errors import ExpiredKeyError, InvalidKeyError, SettingsError

KEY_PREFIX: Final = "nt-"
KEY_BYTES: Final = 32
HASH_PREFIX: Final = "sha256:"
MAX_FILE_BYTES: Final = 2**20
MAX_RATE: Final = 2**31 - 1
MAX_DEPTH: Final = 8


def _whole(text: Any) -> int:
    if not isinstance(text, str | int) or not re.fullmatch(r"[1-9][0-9]{0,9}", str(text), re.ASCII):
        raise ValueError(f"must be a whole number from 1 to {MAX_RATE}")
    return int(text)


def _moment(text: Any) -> datetime:
    """An ISO 8601 date and time with its zone."""
    try:
        moment = text if isinstance(text, datetime) else datetime.fromisoformat(text)
    except (TypeError, ValueError):
        moment = datetime.min
    if moment.tzinfo is None:
        raise ValueError("must be a date and time with a zone, as 2027-01-31T00:00:00Z")
    try:
        return moment.astimezone(UTC)
    except OverflowError:
        raise ValueError("must lie between the years 1 and 9999 in UTC; leave it out for no end") from None


Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
Rate = Annotated[int, BeforeValidator(_whole), Field(le=MAX_RATE)]
Text = Annotated[str, StringConstraints(min_length=1)]


class Entry(BaseModel):
    """One key of the file: its name, the hash of it, and what its holder may do."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Name
    hash: Annotated[str, StringConstraints(pattern=rf"^{HASH_PREFIX}[0-9a-f]{{64}}$")]
    role: Literal["user", "admin"] = "user"
    floor: Text | None = None
    default: Text | None = None
    models: tuple[Text, ...] | None = None
    requests_per_minute: Rate | None = None
    tokens_per_minute: Rate | None = None
    expires: Annotated[datetime, BeforeValidator(_moment)] | None = None

    def caller(self, default_floor: str) -> Caller:
        """Its holder."""
        return Caller(
            name=self.name,
            role=self.role,
            floor=default_floor if self.floor is None else self.floor,
            default=self.default,
            models=self.models,
            requests_per_minute=self.requests_per_minute,
            tokens_per_minute=self.tokens_per_minute,
        )


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    keys: tuple[Entry, ...]


def new_key() -> str:
    """A key that nobody can guess."""
    return KEY_PREFIX + secrets.token_urlsafe(KEY_BYTES)


def hash_of(key: bytes) -> str:
    """What the file holds of a key."""
    return HASH_PREFIX + hashlib.sha256(key).hexdigest()


def read_entries(path: Path) -> tuple[Entry, ...]:
    """The keys in a file.

    Raises:
        SettingsError: the file cannot be read, or is not a key file; names the line.
    """
    return parse_entries(read_text(path), path)


def read_text(path: Path) -> str:
    """The text of a key file. Raises SettingsError."""
    try:
        return read_regular(path, MAX_FILE_BYTES).decode("utf-8")
    except OSError as error:
        raise SettingsError(f"Key file {path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise SettingsError(f"Key file {path} is not UTF-8: {error.reason} at byte {error.start}.") from error


def parse_entries(text: str, path: Path) -> tuple[Entry, ...]:
    """The keys in the text of a file; `path` is for errors. Every value is read as the text that it is:
    in YAML's own reading `off` would be false and `010` eight.

    Raises:
        SettingsError: it is not a key file; names the line.
    """
    try:
        root = compose(text)
        content = None if root is None else _plain(root)
        entries = _File.model_validate(content).keys
    except yaml.MarkedYAMLError as error:
        line = 1 if error.problem_mark is None else error.problem_mark.line + 1
        raise SettingsError(f"Key file {path}, line {line}: {error.problem}.") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise SettingsError(f"Key file {path} is not YAML that can be read: {_first_line(error)}.") from error
    except ValidationError as error:
        raise SettingsError(f"Key file {path}{_sentence(root, error)}") from error
    _refuse_twice(entries, path)
    return entries


def compose(text: str) -> yaml.Node | None:
    """YAML as nodes, without aliases and no deeper than a key file is: the reader's time grows with the
    square of the depth."""
    depth = 0
    mark: Any
    for event in yaml.parse(text, Loader=yaml.BaseLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            mark = event.start_mark
            raise yaml.MarkedYAMLError(problem="a key file is not nested so deeply", problem_mark=mark)
        if isinstance(event, yaml.AliasEvent):
            mark = event.start_mark
            raise yaml.MarkedYAMLError(problem="a key file has no aliases", problem_mark=mark)
    return yaml.compose(text, Loader=yaml.BaseLoader)


def _plain(node: yaml.Node) -> Any:
    if isinstance(node, yaml.SequenceNode):
        return [_plain(each) for each in node.value]
    if not isinstance(node, yaml.MappingNode):
        return node.value
    found: dict[str, Any] = {}
    for name, value in node.value:
        if not isinstance(name, yaml.ScalarNode):
            raise yaml.MarkedYAMLError(problem="a field's name must be text", problem_mark=name.start_mark)
        if name.value in found:
            raise yaml.MarkedYAMLError(problem=f"{name.value!r} is given twice", problem_mark=name.start_mark)
        found[name.value] = _plain(value)
    return found


def _sentence(root: yaml.Node | None, failed: ValidationError) -> str:
    """The first error with its line, in words that quote nothing that may be secret."""
    error = failed.errors(include_url=False)[0]
    if root is None or not error["loc"]:
        return ": it must hold `keys:` and under it a list of keys."
    line = _line(root, error["loc"])
    if error["type"] == "extra_forbidden":
        fields = ", ".join(Entry.model_fields) if len(error["loc"]) > 1 else "keys"
        return f", line {line}: a field that a key file does not have. Accepted: {fields}."
    where = ".".join(str(part) for part in error["loc"])
    if error["loc"][-1] == "hash" and error["type"] != "missing":
        return f", line {line}: {where} must be {HASH_PREFIX} and 64 digits: `neurontune keys add` makes it."
    said = error["msg"].removeprefix("Value error, ").replace("Input should", "should")
    return f", line {line}: {where}: {said}."


def _line(node: yaml.Node, location: Sequence[int | str]) -> int:
    """The line of what `location` names, or of the nearest around it."""
    for part in location:
        inner = None
        if isinstance(node, yaml.MappingNode):
            inner = next((value for name, value in node.value if name.value == part), None)
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int):
            inner = node.value[part]
        if inner is None:
            break
        node = inner
    return int(node.start_mark.line) + 1


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _refuse_twice(entries: Sequence[Entry], path: Path) -> None:
    for name, count in Counter(entry.name for entry in entries).items():
        if count > 1:
            raise SettingsError(f"Key file {path}: the name {name!r} is given to two keys. Rename one.")
        if name == ANONYMOUS.name:
            raise SettingsError(f"Key file {path}: {name!r} is whoever comes without a key. Rename this one.")
    hashes = Counter(entry.hash for entry in entries)
    for entry in entries:
        if hashes[entry.hash] > 1:
            raise SettingsError(f"Key file {path}: {entry.name!r} and another name have the same key.")


def now() -> datetime:
    """This moment."""
    return datetime.now(UTC)


Keys = tuple[tuple[str, datetime | None, Caller], ...]
"""The hash of each key, when it ends, and whose it is."""


def callers_in(keys: Keys) -> tuple[Caller, ...]:
    """Everybody who has one of the keys."""
    return tuple(caller for _, _, caller in keys)


class Keyring:
    """The keys in force: all those of the file, as it was when it was last read and used."""

    def __init__(
        self,
        path: Path,
        default_floor: str,
        check: Callable[[Sequence[Caller]], None],
        clock: Callable[[], datetime] = now,
    ) -> None:
        """Read the file. `check` refuses callers that make no sense.

        Raises:
            SettingsError: the file cannot be used.
        """
        self._path = path
        self._default_floor = default_floor
        self._check = check
        self._clock = clock
        self._known: Keys = ()
        self.use(self.read())

    @property
    def callers(self) -> tuple[Caller, ...]:
        """Everybody who has a key."""
        return callers_in(self._known)

    def read(self) -> Keys:
        """What the file has now. Raises SettingsError if it is no key file."""
        return tuple(
            (entry.hash, entry.expires, entry.caller(self._default_floor))
            for entry in read_entries(self._path)
        )

    def use(self, keys: Keys) -> None:
        """Put them in force, all of them or none. Raises SettingsError if they make no sense."""
        try:
            self._check(callers_in(keys))
        except SettingsError as error:
            raise SettingsError(f"Key file {self._path}: {error}") from error
        self._known = keys

    def find(self, key: bytes) -> Caller:
        """Whose key this is, compared with every key in constant time.

        Raises:
            InvalidKeyError: nobody's.
            ExpiredKeyError: its time is over.
        """
        presented, found = hash_of(key), None
        for known in self._known:
            if hmac.compare_digest(presented, known[0]):
                found = known
        if found is None:
            raise InvalidKeyError("This API key is not known here. Whoever runs this server hands keys out.")
        _, expires, caller = found
        if expires is not None and self._clock() >= expires:
            when = expires.isoformat(timespec="seconds")
            raise ExpiredKeyError(f"The API key {caller.name!r} expired at {when}. Ask for a new one.")
        return caller
