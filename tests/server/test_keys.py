"""The key file and its commands: what is read, what is refused with its line, what is printed and kept."""

import os
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from server.callers import Caller
from server.cli import app
from server.errors import ExpiredKeyError, InvalidKeyError, SettingsError
from server.keys import Keyring, hash_of, new_key, parse_entries, read_entries
from tests.server.keying import key_file, key_of

HASH = "sha256:" + "0" * 64
FILE = Path("keys.yaml")


def accept(_callers: Any) -> None:
    """No caller is refused."""


def run(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, ["keys", *map(str, arguments)])


def test_every_field_reaches_the_caller(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(
        f"""
keys:
- name: mobile
  hash: {hash_of(b"nt-1")}
  floor: off   # in YAML's own reading: false
  default: 120
  models: [demo]
  requests_per_minute: 60
  tokens_per_minute: 100000
  expires: 2999-01-31T00:00:00+02:00
- {{name: root, hash: "{hash_of(b"nt-2")}", role: admin}}
"""
    )
    keyring = Keyring(path, "balanced", accept)
    assert keyring.find(b"nt-1") == Caller("mobile", "user", "off", "120", ("demo",), 60, 100000)
    assert keyring.find(b"nt-2") == Caller("root", "admin", "balanced")
    with pytest.raises(InvalidKeyError):
        keyring.find(b"nt-3")


def test_a_key_ends_when_it_expires(tmp_path: Path) -> None:
    end = datetime(2027, 1, 31, tzinfo=UTC)
    moments = iter([end - timedelta(seconds=1), end])
    path = key_file(tmp_path / "keys.yaml", mobile={"expires": end.isoformat()})
    keyring = Keyring(path, "balanced", accept, clock=lambda: next(moments))
    assert keyring.find(key_of("mobile").encode()).name == "mobile"
    with pytest.raises(ExpiredKeyError, match="'mobile' expired at 2027-01-31"):
        keyring.find(key_of("mobile").encode())


def test_every_known_key_is_compared_whoever_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """How long it takes says neither whether nor where a key is in the file."""
    path = key_file(tmp_path / "keys.yaml", a={}, b={}, c={})
    compared: list[str] = []

    def compare(one: str, other: str) -> bool:
        compared.append(other)
        return one == other

    monkeypatch.setattr("server.keys.hmac.compare_digest", compare)
    keyring = Keyring(path, "balanced", accept)
    for key in (key_of("a"), key_of("c")):
        keyring.find(key.encode())
    with pytest.raises(InvalidKeyError):
        keyring.find(b"")
    assert len(compared) == 9


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "it must hold `keys:`"),
        ("[]", "it must hold `keys:`"),
        ("keys: {}", "line 1: keys"),
        ("keys:\n- name: a\n", "line 2: keys.0.hash"),
        (f"keys:\n- name: a\n  hash: {HASH}\n  flor: off\n", "line 4: a field that a key file does not have"),
        (f"keyes:\n- name: a\n  hash: {HASH}\n", "keys"),
        (f"keys:\n- name: a b\n  hash: {HASH}\n", "line 2: keys.0.name"),
        ("keys:\n- name: a\n  hash: nt-oops-the-key-itself\n", "line 3: keys.0.hash must be sha256:"),
        (f"keys:\n- name: a\n  hash: {HASH}\n  floor:\n", "line 4: keys.0.floor"),
        (f"keys:\n- name: a\n  hash: {HASH}\n  role: boss\n", "line 4: keys.0.role"),
        (f"keys:\n- name: a\n  hash: {HASH}\n  expires: 2027-01-31\n", "with a zone"),
        (f"keys:\n- name: a\n  hash: {HASH}\n  expires: soon\n", "with a zone"),
        (f"keys:\n- name: a\n  hash: {HASH}\n  requests_per_minute: 0\n", "whole number from 1"),
        (f"keys:\n- name: a\n  hash: {HASH}\n  tokens_per_minute: 1_000\n", "whole number from 1"),
        (f"keys:\n- name: a\n  name: b\n  hash: {HASH}\n", "line 3: 'name' is given twice"),
        (f"keys:\n- name: anonymous\n  hash: {HASH}\n", "whoever comes without a key"),
        (f"keys:\n- name: a\n  hash: {HASH}\n- name: a\n  hash: {HASH[:-1]}1\n", "'a' is given to two"),
        (f"keys:\n- name: a\n  hash: {HASH}\n- name: b\n  hash: {HASH}\n", "the same key"),
        ("keys:\n- &a\n  - *a\n", "line 3: a key file has no aliases"),
        ("keys: [", "line 1"),
        ("keys:\n  - a: b\n c: d\n", "line 3"),
        ("keys: []\n---\nkeys: []\n", "line 2"),
        ("keys:\n- !!python/object/apply:os.system [true]\n", "line 2: keys.0"),
        ("keys: [[1, 2]: 3]", "must be text"),
        ("[" * 5000, "line 1: a key file is not nested so deeply"),
        ("keys: " + "[" * 10**6, "line 1: a key file is not nested so deeply"),
        ("- " * 500_000, "line 1: a key file is not nested so deeply"),
        ("keys: \0", "keys.yaml"),
    ],
)
def test_a_file_that_is_none_is_refused_with_its_line(text: str, words: str) -> None:
    with pytest.raises(SettingsError) as refused:
        parse_entries(text, FILE)
    message = str(refused.value)
    assert message.startswith("Key file keys.yaml") and words in message and "\n" not in message
    assert "oops" not in message


@given(st.text() | st.lists(st.sampled_from("-:{}[]&*! \n#kname"), max_size=40).map("".join))
def test_no_text_breaks_the_reader(text: str) -> None:
    try:
        parse_entries(text, FILE)
    except SettingsError as error:
        assert "\n" not in str(error)


def test_a_reload_takes_the_whole_file_or_nothing(tmp_path: Path) -> None:
    path = key_file(tmp_path / "keys.yaml", a={}, b={})
    keyring = Keyring(path, "balanced", accept)
    path.write_text("keys: [")
    with pytest.raises(SettingsError, match=r"keys\.yaml, line 1"):
        keyring.use(keyring.read())
    assert [caller.name for caller in keyring.callers] == ["a", "b"]
    key_file(path, b={"floor": "off"}, c={})
    keyring.use(keyring.read())
    assert [(caller.name, caller.floor) for caller in keyring.callers] == [("b", "off"), ("c", "balanced")]
    with pytest.raises(InvalidKeyError):
        keyring.find(key_of("a").encode())


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="cannot be read: No such file"):
        read_entries(tmp_path / "none.yaml")


def test_keys_are_long_and_never_the_same() -> None:
    keys = {new_key() for _ in range(100)}
    assert len(keys) == 100 and all(key.startswith("nt-") and len(key) == 46 for key in keys)


def test_added_keys_are_printed_once_and_work(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    first = run("add", "--file", path, "--name", "mobile", "--floor", "off")
    flags = ["--default", "64", "--model", "demo", "--model", "other", "--requests-per-minute", "5"]
    flags += ["--tokens-per-minute", "700", "--expires", "2999-01-31T00:00:00+02:00", "--role", "admin"]
    second = run("add", "--file", path, "--name", "root", *flags)
    assert first.exit_code == second.exit_code == 0
    keys = [each.stdout.splitlines()[-1] for each in (first, second)]
    assert [each.stdout for each in (first, second)] == [f"{key}\n" for key in keys]
    keyring = Keyring(path, "balanced", accept)
    assert keyring.find(keys[0].encode()) == Caller("mobile", floor="off")
    assert keyring.find(keys[1].encode()) == Caller(
        "root", "admin", "balanced", "64", ("demo", "other"), 5, 700
    )
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert not any(key in path.read_text() for key in keys)
    assert [each.name for each in tmp_path.iterdir()] == ["keys.yaml"]


def test_listed_keys_show_what_they_may_and_no_secret(tmp_path: Path) -> None:
    path = key_file(
        tmp_path / "keys.yaml", mobile={"floor": "off"}, old={"expires": "2001-01-01T00:00:00+00:00"}
    )
    shown = run("list", "--file", path)
    assert shown.stdout == "mobile  floor off\nold  expires 2001-01-01T00:00:00+00:00  EXPIRED\n"


def test_adding_and_removing_keep_comments(tmp_path: Path) -> None:
    path = key_file(tmp_path / "keys.yaml", a={"floor": "off"}, b={})
    commented = "# of the mobile team\n" + path.read_text()
    path.write_text(commented)
    assert run("add", "--file", path, "--name", "c").exit_code == 0
    assert path.read_text().startswith(commented)
    for name, left in (("b", "ac"), ("a", "c"), ("c", "")):
        assert run("remove", "--file", path, "--name", name).exit_code == 0
        assert [entry.name for entry in read_entries(path)] == list(left)
        assert ("# of the mobile team" in path.read_text()) == bool(left)


def test_a_file_in_another_layout_is_written_anew(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(
        f'{{"keys": [{{"name": "a", "hash": "{HASH}"}}, {{"name": "b", "hash": "{HASH[:-1]}1"}}]}}'
    )
    assert run("add", "--file", path, "--name", "c").exit_code == 0
    assert run("remove", "--file", path, "--name", "a").exit_code == 0
    assert [entry.name for entry in read_entries(path)] == ["b", "c"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("add", "--name", "mobile"), "has a key 'mobile'"),
        (("add", "--name", "a b"), "--name: "),
        (("add", "--name", "x", "--floor", ""), "--floor: "),
        (("add", "--name", "x", "--expires", "tomorrow"), "--expires: must be a date and time with a zone"),
        (("add", "--name", "x", "--tokens-per-minute", "-1"), "--tokens-per-minute: "),
        (("add", "--name", "x", "--role", "boss"), "--role: "),
        (("add", "--name", "anonymous"), "whoever comes without a key"),
        (("remove", "--name", "x"), "has no key 'x'. It has: mobile."),
    ],
)
def test_what_the_commands_refuse_is_one_sentence(
    tmp_path: Path, arguments: tuple[str, ...], words: str
) -> None:
    path = key_file(tmp_path / "keys.yaml", mobile={})
    before = path.read_bytes()
    result = run(arguments[0], "--file", path, *arguments[1:])
    assert result.exit_code == 1 and result.stdout == ""
    assert result.stderr.startswith("neurontune: ") and words in result.stderr
    assert len(result.stderr.splitlines()) == 1 and path.read_bytes() == before


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    result = run("add", "--file", tmp_path / "none" / "keys.yaml", "--name", "a")
    assert result.exit_code == 1 and "cannot be written: No such file" in result.stderr


@pytest.mark.parametrize(
    "text",
    [
        "keys: nt-secretsecretsecret",
        "keys:\n- nt-secretsecretsecret\n",
        "keys:\n- name: nt-secretsecretsecret!\n",
        "keys:\n- nt-secretsecretsecret: x\n",
        "nt-secretsecretsecret: x\n",
        "keys:\n- {name: a, hash: nt-secretsecretsecret}\n",
        "keys:\n- {name: a, expires: nt-secretsecretsecret}\n",
    ],
)
def test_a_key_that_stands_where_it_should_not_is_not_repeated_in_the_error(text: str) -> None:
    with pytest.raises(SettingsError) as refused:
        parse_entries(text, FILE)
    assert "secretsecret" not in str(refused.value)


def test_an_expiry_at_the_end_of_time_is_refused_in_words() -> None:
    entry = f"{{name: a, hash: 'sha256:{'0' * 64}', expires: '9999-12-31T23:59:59-05:00'}}"
    with pytest.raises(SettingsError, match="leave it out for no end"):
        parse_entries(f"keys:\n- {entry}\n", FILE)


def test_a_pipe_is_no_key_file(tmp_path: Path) -> None:
    pipe = tmp_path / "keys.yaml"
    os.mkfifo(pipe)
    with pytest.raises(SettingsError, match="not a regular file"):
        read_entries(pipe)
