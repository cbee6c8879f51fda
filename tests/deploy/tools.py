"""What these tests run and read: programs, the Dockerfile, the settings that a container would get."""

import os
import shlex
import shutil
import subprocess
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from dockerfile_parse import DockerfileParser

from server.settings import PREFIX, Settings, read_settings

ROOT = Path(__file__).parent.parent.parent
UID = 10001


def tool(name: str) -> str:
    """The path of a program, this environment's before the machine's. Without it: a skip that says so."""
    places = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
    found = shutil.which(name, path=places)
    if found is None:
        pytest.skip(f"{name} is not installed: the extra [deployment] and .ci/run say where it comes from")
    return found


def run(command: Sequence[str], **more: Any) -> subprocess.CompletedProcess[str]:
    """A command that has ended, with what it printed."""
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, **more)


def output(command: Sequence[str], **more: Any) -> str:
    """What a command that succeeds prints."""
    done = run(command, **more)
    assert done.returncode == 0, done.stderr
    return done.stdout


def stages() -> dict[str, list[tuple[str, str]]]:
    """The Dockerfile: of every stage, by name, its instructions in order, FROM first."""
    found: dict[str, list[tuple[str, str]]] = {}
    with (ROOT / "Dockerfile").open("rb") as file:
        structure = DockerfileParser(fileobj=file).structure
    name = ""
    for step in structure:
        if step["instruction"] == "FROM":
            name = step["value"].split()[-1]
        if step["instruction"] != "COMMENT":
            found.setdefault(name, []).append((step["instruction"], step["value"]))
    return found


def assigned(steps: Sequence[tuple[str, str]], kind: str) -> dict[str, str]:
    """What the steps of one kind (ENV, ARG, LABEL) assign, as it is written."""
    words = [word for each, value in steps if each == kind for word in shlex.split(value)]
    return {name: value for name, _, value in (word.partition("=") for word in words)}


def resolved(
    monkeypatch: pytest.MonkeyPatch, environment: Mapping[str, str], arguments: Sequence[str]
) -> Settings:
    """The settings of a container with this environment and these arguments, over what the image sets.

    Raises:
        SettingsError: the server would refuse to start.
    """
    for name in [name for name in os.environ if name.upper().startswith(PREFIX)]:
        monkeypatch.delenv(name)
    for name, value in {**assigned(stages()["runtime"], "ENV"), **environment}.items():
        if name.startswith(PREFIX):
            monkeypatch.setenv(name, value)
    command, *flags = arguments
    assert command == "serve", arguments
    names = [flag.removeprefix("--").replace("-", "_") for flag in flags[::2]]
    return read_settings(dict(zip(names, flags[1::2], strict=True)))
