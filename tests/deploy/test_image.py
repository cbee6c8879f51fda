"""The Dockerfile without Docker: linted, its context read as Docker does, its Python lines run as they stand.

What the lines of apt-get do, and that the stages fit together, only a real build can show.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from string import Template

import pytest
from docker.utils.build import exclude_paths

from server.settings import Settings
from tests.deploy.tools import ROOT, UID, assigned, output, run, stages, tool

BUILD_SECONDS = 600
START_SECONDS = 120

# The first test that needs the image waits for its build.
pytestmark = pytest.mark.timeout(2 * BUILD_SECONDS + START_SECONDS)


def context() -> list[str]:
    """The files that Docker's builder would get."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    patterns = [line for line in lines if line and not line.startswith("#")]
    return sorted(path for path in exclude_paths(str(ROOT), patterns) if (ROOT / path).is_file())


def test_the_dockerfile_is_linted() -> None:
    output([tool("hadolint"), "--failure-threshold", "style", str(ROOT / "Dockerfile")])


def test_the_linter_finds_what_is_wrong(tmp_path: Path) -> None:
    wrong = tmp_path / "Dockerfile"
    wrong.write_text("FROM python\nRUN cd /tmp\n")
    assert run([tool("hadolint"), str(wrong)]).returncode != 0


def test_the_context_holds_what_is_copied_and_nothing_that_is_kept_out_of_git() -> None:
    sent = [path for path in context() if path not in ("Dockerfile", ".dockerignore")]
    tops = {path.split("/")[0] for path in sent}
    assert tops == {
        "constraints.txt",
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "modulation",
        "server",
        "deploy",
    }
    assert [path for path in sent if path.startswith("deploy/")] == ["deploy/ready.py"]
    assert not [path for path in sent if "/." in path or "__pycache__" in path]


def test_without_a_target_the_image_is_the_one_for_cpu() -> None:
    assert list(stages())[-1] == "cpu"
    assert "cuda" in stages()


def test_both_targets_run_as_a_user_without_a_name() -> None:
    for target in ("cpu", "cuda"):
        users = [value for name in ("runtime", target) for kind, value in stages()[name] if kind == "USER"]
        assert users[-1] == f"{UID}:{UID}"


def test_the_base_is_pinned_and_is_a_python_that_the_project_takes() -> None:
    bases = {value.split()[0] for steps in stages().values() for kind, value in steps if kind == "FROM"}
    (image,) = bases - set(stages())
    found = re.fullmatch(r"python:(\d+)\.(\d+)\.\d+-slim-bookworm", image)
    assert found, image
    required = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    assert required == ">=3.11" and (int(found[1]), int(found[2])) >= (3, 11)


def test_the_image_says_what_it_is() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    labels = assigned(stages()["runtime"], "LABEL")
    assert labels["org.opencontainers.image.licenses"] == project["license"]
    assert labels["org.opencontainers.image.description"] == project["description"]
    assert assigned(stages()["runtime"], "ARG")["VERSION"] == project["version"]


def test_the_entrypoint_is_no_shell_so_that_signals_reach_the_server() -> None:
    last = dict(stages()["runtime"])
    assert last["ENTRYPOINT"] == '["tini", "--", "neurontune"]'
    assert last["CMD"] == '["serve"]'
    assert "/bin/sh" not in last["HEALTHCHECK"] and 'CMD ["python"' in last["HEALTHCHECK"]


class Image:
    """What the stage `build-cpu` leaves, built under `folder` instead of `/`."""

    def __init__(self, folder: Path) -> None:
        self.source = folder / "src"
        self.models = folder / "models"
        self.scratch = folder / "tmp"
        self.venv = folder / "neurontune"
        self.programs = folder / "programs"
        for each in (self.source, self.models, self.scratch, self.programs):
            each.mkdir()
        # The image's `python` is the one that runs these tests.
        python = self.programs / "python"
        python.write_text(f'#!/bin/sh\nexec "{sys._base_executable}" "$@"\n')  # type: ignore[attr-defined]
        python.chmod(0o755)

    def build(self) -> None:
        """Run the steps of `build-cpu` and of the stage that it stands on, as they are written."""
        ours = ("NEURONTUNE_", "PYTHON", "VIRTUAL_ENV")
        environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
        # No Python but ours in PATH, and a pip that refuses to install outside of a virtual environment: a
        # mistake here must not reach the Python of whoever runs the tests.
        environment |= {"PATH": f"{self.programs}:/usr/bin:/bin", "PIP_REQUIRE_VIRTUALENV": "1"}
        # The index of torch without CUDA is not reached from everywhere; pip's own settings find it as well.
        given = {"TORCH_INDEX": ""}
        sent = context()
        for kind, value in [*stages()["build"], *stages()["build-cpu"]]:
            if kind in ("FROM", "WORKDIR"):
                continue
            elif kind == "ARG":
                name = value.split("=", 1)[0]
                environment[name] = given.pop(name)
            elif kind == "ENV":
                environment |= self.environment(assigned([(kind, value)], kind), environment)
            elif kind == "COPY":
                *names, _ = value.split()
                for name in names:
                    self._copy(name, sent)
            elif kind == "RUN":
                self._run(re.sub(r"--mount=\S+\s+", "", value), environment)
            else:
                pytest.fail(f"a step that this test does not know: {kind}")
        assert not given

    def environment(self, written: Mapping[str, str], before: Mapping[str, str]) -> dict[str, str]:
        """The variables of an ENV step, with what lies elsewhere here."""
        found = dict(before)
        for name, value in written.items():
            # Before anything is put into it: these folders may lie in /tmp themselves.
            for there, here in (
                ("/opt/neurontune", self.venv),
                ("/models", self.models),
                ("/tmp", self.scratch),
            ):
                if value == there or value.startswith(f"{there}/"):
                    value = f"{here}{value.removeprefix(there)}"
                    break
            found[name] = Template(value).substitute(found)
        return {name: found[name] for name in written}

    def _copy(self, name: str, sent: list[str]) -> None:
        copied = [path for path in sent if path == name or path.startswith(f"{name}/")]
        assert copied, f"COPY {name}: .dockerignore keeps it out"
        for path in copied:
            (self.source / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / path, self.source / path)

    def _run(self, line: str, environment: Mapping[str, str]) -> None:
        done = subprocess.run(
            ["/bin/sh", "-c", line],
            cwd=self.source,
            env=environment,
            capture_output=True,
            text=True,
            timeout=BUILD_SECONDS,
            check=False,
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"

    def variables(self, **more: str) -> dict[str, str]:
        """A container's environment: the image's, and nothing of this machine's but where programs are."""
        bare = {"PATH": "/usr/bin:/bin", "HOME": str(self.scratch), "TMPDIR": str(self.scratch)}
        return {**bare, **self.environment(assigned(stages()["runtime"], "ENV"), bare), **more}

    def command(self, *arguments: str) -> list[str]:
        """The entrypoint, with arguments in the place of CMD."""
        return [tool("tini"), "-s", "--", str(self.venv / "bin" / "neurontune"), *arguments]

    def written(self) -> set[tuple[str, int]]:
        """Every file outside of /tmp, and when it was written."""
        return {
            (str(path), path.stat().st_mtime_ns)
            for folder in (self.venv, self.models, self.source)
            for path in folder.rglob("*")
        }


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    """Built once: it takes a minute or two."""
    built = Image(tmp_path_factory.mktemp("image"))
    built.build()
    return built


@pytest.fixture
def keys(image: Image, tmp_path: Path) -> Path:
    """A key file that the image's own command made."""
    file = tmp_path / "keys.yaml"
    output(image.command("keys", "add", "--file", str(file), "--name", "somebody"), env=image.variables())
    return file


def test_the_environment_is_complete_and_is_not_the_one_of_these_tests(image: Image) -> None:
    output([str(image.venv / "bin" / "pip"), "check"], env=image.variables())
    where = "import server, modulation; print(server.__file__, modulation.__file__)"
    found = output([str(image.venv / "bin" / "python"), "-c", where], env=image.variables(), cwd=ROOT)
    assert found.count(str(image.venv)) == 2


def test_the_constraints_hold(image: Image) -> None:
    pinned = (image.source / "constraints.txt").read_text().split()
    frozen = output([str(image.venv / "bin" / "pip"), "freeze"], env=image.variables())
    for line in pinned:
        assert re.search(rf"^{re.escape(line)}(\+cpu)?$", frozen, re.MULTILINE), line


def test_without_keys_the_image_refuses_to_start(image: Image) -> None:
    done = run(image.command("serve"), env=image.variables())
    assert done.returncode == 1
    assert "without keys whoever reaches it may ask" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture
def before(image: Image, keys: Path) -> set[tuple[str, int]]:  # noqa: ARG001 - made by the image's command
    """What the image holds before it starts."""
    return image.written()


@pytest.fixture
def container(
    image: Image,
    keys: Path,
    before: set[tuple[str, int]],  # noqa: ARG001 - looked at before anything starts
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The entrypoint as it runs in a container, but on loopback; and its port, once it answers."""
    loopback = {"NEURONTUNE_HOST": "127.0.0.1", "NEURONTUNE_PORT": "0"}
    process = subprocess.Popen(
        image.command("serve"),
        env=image.variables(NEURONTUNE_KEYS=str(keys), OMP_NUM_THREADS="1", **loopback),
        cwd=image.models,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        assert process.stdout is not None
        said = []
        for line in process.stdout:
            said.append(line)
            if found := re.match(r"address +http://\S+:(\d+)", line):
                break
        else:
            pytest.fail(f"it ended before it was ready: {''.join(said)}")
        yield process, found[1]
    finally:
        process.kill()
        process.communicate(timeout=START_SECONDS)


def healthy(image: Image, port: str) -> subprocess.CompletedProcess[str]:
    """The image's health check."""
    script = [str(image.venv / "bin" / "python"), str(ROOT / "deploy" / "ready.py")]
    return run(script, env=image.variables(NEURONTUNE_PORT=port, HTTP_PROXY="http://127.0.0.1:9"))


def test_it_is_ready_writes_nothing_and_stops_on_sigterm_with_exit_code_0(
    image: Image, before: set[tuple[str, int]], container: tuple[subprocess.Popen[str], str]
) -> None:
    process, port = container
    assert healthy(image, port).returncode == 0
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=START_SECONDS)
    assert process.returncode == 0
    assert image.written() == before
    gone = healthy(image, port)
    assert gone.returncode == 1 and "No answer" in gone.stderr


def test_the_health_check_asks_at_the_port_that_the_server_takes() -> None:
    asked = re.search(r'"NEURONTUNE_PORT", "(\d+)"', (ROOT / "deploy" / "ready.py").read_text())
    assert asked and int(asked[1]) == Settings.model_fields["port"].default
