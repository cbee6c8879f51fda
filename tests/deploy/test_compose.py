"""docker-compose.yml, read by Compose itself, which checks it against the specification it carries."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from server.process import BACKSTOP_SECONDS
from server.settings import Settings
from tests.deploy.tools import ROOT, UID, output, resolved, run, stages, tool

FILE = ROOT / "docker-compose.yml"
PASSWORD = {"GRAFANA_ADMIN_PASSWORD": "chosen for this test"}
PAGE = (ROOT / "docs" / "deployment.md").read_text()


def command(file: Path, *arguments: str) -> list[str]:
    """Compose on a file, with nothing from an .env file of whoever runs the tests."""
    place = ["--project-directory", str(ROOT), "--env-file", "/dev/null", "--file", str(file)]
    return [tool("docker-compose"), *place, *arguments]


def composed(file: Path = FILE, **variables: str) -> dict[str, Any]:
    """The whole project, every profile of it, as Compose understands it."""
    read = command(file, "--profile", "*", "config", "--format", "json")
    found: dict[str, Any] = json.loads(output(read, env=PASSWORD | variables))
    return found


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    """The project as it is without any variable that may be left out."""
    return composed()


def test_it_has_the_services_and_only_the_gpu_needs_a_profile(project: dict[str, Any]) -> None:
    profiles = {name: service.get("profiles") for name, service in project["services"].items()}
    assert profiles.pop("server-gpu") == ["gpu"]
    assert profiles == dict.fromkeys(("server", "prometheus", "alertmanager", "grafana"))


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("read_only: true", "read_onyl: true"),
        ("tmpfs: [", "tmpfs: [3, "),
        ("profiles: [gpu]", "profiles: gpu"),
    ],
)
def test_compose_refuses_what_the_specification_does_not_have(tmp_path: Path, right: str, wrong: str) -> None:
    text = FILE.read_text()
    assert right in text
    broken = tmp_path / "docker-compose.yml"
    broken.write_text(text.replace(right, wrong))
    assert run(command(broken, "--profile", "*", "config", "--quiet"), env=PASSWORD).returncode != 0


@pytest.mark.parametrize("given", [{}, {"GRAFANA_ADMIN_PASSWORD": ""}])
def test_without_a_password_for_grafana_nothing_starts(given: dict[str, str]) -> None:
    done = run(command(FILE, "config", "--quiet"), env=given)
    assert done.returncode != 0 and "GRAFANA_ADMIN_PASSWORD" in done.stderr


def test_every_service_is_confined(project: dict[str, Any]) -> None:
    for name, service in project["services"].items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"] and "cap_add" not in service, name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert not service.get("privileged"), name
        assert int(service["user"].split(":")[0]) > 0, name
        limits = service["deploy"]["resources"]["limits"]
        assert {"cpus", "memory", "pids"} <= set(limits), name
        assert any(mount.startswith("/tmp:size=") for mount in service["tmpfs"]), name


def test_the_server_runs_as_the_user_of_the_image(project: dict[str, Any]) -> None:
    for name in ("server", "server-gpu"):
        assert project["services"][name]["user"] == f"{UID}:{UID}"


def test_every_port_is_open_to_this_machine_alone(project: dict[str, Any]) -> None:
    for name, service in project["services"].items():
        assert service["ports"], name
        assert {port["host_ip"] for port in service["ports"]} == {"127.0.0.1"}, name


def test_every_service_is_watched_by_a_health_check(project: dict[str, Any]) -> None:
    for name, service in project["services"].items():
        if name.startswith("server"):
            assert "HEALTHCHECK" in dict(stages()["runtime"]) and "healthcheck" not in service
        else:
            assert service["healthcheck"]["test"][0] == "CMD", name


def test_images_of_others_are_pinned_and_ours_are_built_from_a_target(project: dict[str, Any]) -> None:
    for name, service in project["services"].items():
        if "build" in service:
            assert service["build"]["target"] in stages()
            assert service["image"].endswith(f"-{service['build']['target']}")
        else:
            assert re.fullmatch(r"[a-z]+/[a-z]+:v?\d+\.\d+\.\d+", service["image"]), name


@pytest.mark.parametrize("name", ["server", "server-gpu"])
@pytest.mark.parametrize("own", [{}, {"MODEL": "/models/own", "MASK": "/models/a mask.safetensors"}])
def test_the_server_accepts_its_settings(
    monkeypatch: pytest.MonkeyPatch, name: str, own: dict[str, str]
) -> None:
    service = composed(**own)["services"][name]
    settings = resolved(monkeypatch, service["environment"], service["command"])
    assert settings.model == own.get("MODEL", "demo")
    assert settings.mask == (Path(own["MASK"]) if own else None)
    assert settings.host == "0.0.0.0" and not settings.open_to_anyone
    (secret,) = service["secrets"]
    assert settings.keys == Path("/run/secrets") / (secret.get("target") or secret["source"])
    assert {port["target"] for port in service["ports"]} == {settings.port}


def test_running_answers_may_end_before_compose_kills(project: dict[str, Any]) -> None:
    needed = Settings.model_fields["grace_seconds"].default + BACKSTOP_SECONDS
    for name in ("server", "server-gpu"):
        found = re.fullmatch(r"(?:(\d+)m)?(?:(\d+)s)?", project["services"][name]["stop_grace_period"])
        assert found and int(found[1] or 0) * 60 + int(found[2] or 0) > needed


def test_whichever_server_runs_prometheus_finds_it_under_one_name(project: dict[str, Any]) -> None:
    services = project["services"]
    assert services["server-gpu"]["networks"]["serving"]["aliases"] == ["server"]
    assert "serving" in services["server"]["networks"] and "serving" in services["prometheus"]["networks"]
    for name in ("prometheus", "alertmanager", "grafana"):
        assert "watching" in services[name]["networks"]


def test_every_variable_is_documented_with_its_default() -> None:
    lines = output(command(FILE, "--profile", "*", "config", "--variables"), env=PASSWORD).splitlines()[1:]
    used = {line.split()[0] for line in lines}
    rows = re.findall(r"^\| `([A-Z_]+)` \|(.*?)\|", PAGE, re.MULTILINE)
    assert {name for name, _ in rows} == used
    defaults = set(re.findall(r"\$\{([A-Z_]+):-([^}]*)\}", FILE.read_text()))
    for name, default in defaults:
        assert default in dict(rows)[name], f"{name}: {default}"


def mounted(service: dict[str, Any]) -> dict[str, Path]:
    """What of the repository a service sees, by the path where it sees it."""
    return {each["target"]: Path(each["source"]) for each in service["volumes"] if each["type"] == "bind"}


@pytest.fixture
def watching(project: dict[str, Any]) -> dict[str, Any]:
    """The services that watch, where the files that configure them are there."""
    if not (ROOT / "deploy" / "prometheus" / "prometheus.yml").exists():
        pytest.skip("deploy/prometheus and deploy/grafana are not here yet")
    found: dict[str, Any] = project["services"]
    return found


def test_every_file_that_is_mounted_is_there(watching: dict[str, Any]) -> None:
    for service in watching.values():
        for source in mounted(service).values():
            assert source.exists(), source
    configured = [
        flag.split("=", 1)[1]
        for name in ("prometheus", "alertmanager")
        for flag in watching[name]["command"]
        if flag.startswith("--config.file=")
    ]
    seen = {**mounted(watching["prometheus"]), **mounted(watching["alertmanager"])}
    for path in map(Path, configured):
        assert any(
            (source / path.relative_to(target) if source.is_dir() else source).is_file()
            for target, source in seen.items()
            if path.is_relative_to(target)
        ), path


def test_prometheus_and_grafana_name_services_that_are_there(watching: dict[str, Any]) -> None:
    scraped = yaml.safe_load((ROOT / "deploy" / "prometheus" / "prometheus.yml").read_text())
    static = [
        *(one for job in scraped["scrape_configs"] for one in job.get("static_configs", [])),
        *(
            one
            for peer in scraped.get("alerting", {}).get("alertmanagers", [])
            for one in peer.get("static_configs", [])
        ),
    ]
    hosts = {target.rpartition(":")[0] for one in static for target in one["targets"]} - {
        "localhost",
        "127.0.0.1",
    }
    assert {"server", "alertmanager"} <= hosts <= set(watching)
    provisioning = ROOT / "deploy" / "grafana" / "provisioning"
    for path in provisioning.glob("datasources/*.y*ml"):
        for source in yaml.safe_load(path.read_text())["datasources"]:
            host = re.sub(r"^https?://|:\d+$", "", source["url"])
            assert host in watching, path
    for path in provisioning.glob("dashboards/*.y*ml"):
        for provider in yaml.safe_load(path.read_text())["providers"]:
            assert provider["options"]["path"] in mounted(watching["grafana"]), path


def test_the_command_of_the_page_for_a_gpu_names_what_is_there(project: dict[str, Any]) -> None:
    (line,) = re.findall(r"^.*docker compose --profile gpu up.*$", PAGE, re.MULTILINE)
    words = shlex.split(line)
    assert project["services"]["server-gpu"]["profiles"] == [words[words.index("--profile") + 1]]
    assert words[words.index("--scale") + 1] == "server=0"
