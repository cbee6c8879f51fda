"""The manifests, built by kustomize: valid, confined, and in step with the server that they run.

Kubernetes' own kinds are checked against its schemas, those of the Prometheus operator against models made
from its CRDs. No cluster has seen them.
"""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from cloudcoil.models.prometheus_operator import v1 as operator

from server.app import create_app
from server.engines.fake import FakeEngine
from server.metric_table import TABLE
from server.process import BACKSTOP_SECONDS
from server.settings import Settings
from tests.deploy.tools import ROOT, UID, assigned, output, resolved, stages, tool

PLACE = ROOT / "deploy" / "kubernetes"
NAMES = ["base", "monitored", "gpu", "vllm"]
OLDEST = "1.30"
OPERATORS = {"ServiceMonitor": operator.ServiceMonitor, "PrometheusRule": operator.PrometheusRule}
PAGE = (ROOT / "docs" / "deployment.md").read_text()
Manifest = dict[str, Any]


def folder(name: str) -> Path:
    """Where the base or an overlay is."""
    return PLACE / name if name == "base" else PLACE / "overlays" / name


@pytest.fixture(scope="module")
def built() -> dict[str, list[Manifest]]:
    """What kustomize makes of each."""
    command = [tool("kubectl"), "kustomize"]
    return {name: list(yaml.safe_load_all(output([*command, str(folder(name))]))) for name in NAMES}


def of_kind(manifests: list[Manifest], kind: str) -> list[Manifest]:
    """The manifests of a kind."""
    return [each for each in manifests if each["kind"] == kind]


def pod_of(manifests: list[Manifest]) -> Manifest:
    """The spec of the one Deployment's pods."""
    (deployment,) = of_kind(manifests, "Deployment")
    found: Manifest = deployment["spec"]["template"]["spec"]
    return found


def container_of(manifests: list[Manifest]) -> Manifest:
    """The one container of a pod."""
    (found,) = pod_of(manifests)["containers"]
    return dict(found)


def settings_of(manifests: list[Manifest]) -> dict[str, str]:
    """The variables that a container gets."""
    (settings,) = of_kind(manifests, "ConfigMap")
    own = {one["name"]: one["value"] for one in container_of(manifests)["env"] if "value" in one}
    return settings["data"] | own


def test_every_overlay_and_every_component_is_built_here() -> None:
    assert {path.parent.name for path in PLACE.glob("overlays/*/kustomization.yaml")} | {"base"} == set(NAMES)
    used = {
        (folder(name) / component).resolve()
        for name in NAMES
        for component in yaml.safe_load((folder(name) / "kustomization.yaml").read_text()).get(
            "components", []
        )
    }
    assert used == {path.parent for path in PLACE.glob("components/*/kustomization.yaml")}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("version", [OLDEST, kubernetes_validate.latest_version()])
def test_every_manifest_is_valid(built: dict[str, list[Manifest]], name: str, version: str) -> None:
    for manifest in built[name]:
        model = OPERATORS.get(manifest["kind"])
        if model is None:
            kubernetes_validate.validate(manifest, version, strict=True)
        else:
            read = model.model_validate(manifest).model_dump(mode="json", by_alias=True, exclude_unset=True)
            assert read == manifest, "a field that the operator does not know"


def test_the_validators_find_what_is_wrong(built: dict[str, list[Manifest]]) -> None:
    (service,) = of_kind(built["base"], "Service")
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(service | {"spec": {"prots": []}}, OLDEST, strict=True)
    (monitor,) = of_kind(built["monitored"], "ServiceMonitor")
    with pytest.raises(ValueError, match="interval"):
        operator.ServiceMonitor.model_validate(
            monitor | {"spec": {"selector": {}, "endpoints": [{"port": "http", "interval": "often"}]}}
        )


@pytest.mark.parametrize("name", NAMES)
def test_pods_keep_to_the_restricted_profile(built: dict[str, list[Manifest]], name: str) -> None:
    pod, container = pod_of(built[name]), container_of(built[name])
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["securityContext"]["runAsUser"] == pod["securityContext"]["fsGroup"] == UID
    assert not {"hostNetwork", "hostPID", "hostIPC", "initContainers"} & set(pod)
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert all("hostPort" not in port for port in container["ports"])
    for volume in pod["volumes"]:
        (kind,) = set(volume) - {"name"}
        assert kind in ("secret", "emptyDir", "persistentVolumeClaim")
    assert {"cpu", "memory"} <= set(container["resources"]["requests"])
    assert {"cpu", "memory", "ephemeral-storage"} <= set(container["resources"]["limits"])


@pytest.mark.parametrize("name", NAMES)
def test_pods_have_no_token_and_no_variables_of_services(built: dict[str, list[Manifest]], name: str) -> None:
    """A Service called neurontune sets NEURONTUNE_PORT=tcp://..., which is the name of a setting, and
    NEURONTUNE_SERVICE_HOST, which is the name of none: either ends the server at its start."""
    pod = pod_of(built[name])
    (account,) = of_kind(built[name], "ServiceAccount")
    assert pod["automountServiceAccountToken"] is False and account["automountServiceAccountToken"] is False
    assert pod["enableServiceLinks"] is False
    assert pod["serviceAccountName"] == account["metadata"]["name"]


@pytest.mark.parametrize("name", NAMES)
def test_the_server_accepts_its_settings(
    monkeypatch: pytest.MonkeyPatch, built: dict[str, list[Manifest]], name: str
) -> None:
    container = container_of(built[name])
    if name == "vllm" and "tensor_parallel_size" not in Settings.model_fields:
        pytest.skip("needs the vLLM engine")
    settings = resolved(monkeypatch, settings_of(built[name]), container["args"])
    assert settings.host == "0.0.0.0" and not settings.open_to_anyone
    assert container["ports"] == [{"name": "http", "containerPort": settings.port}]
    mounts = {mount["name"]: mount for mount in container["volumeMounts"]}
    assert str(settings.keys).startswith(mounts["keys"]["mountPath"] + "/")
    # One file of a Secret, mounted alone, would never change.
    assert "subPath" not in mounts["keys"] and mounts["keys"]["readOnly"] is True
    for path in (settings.model, settings.mask):
        assert path in ("demo", None) or str(path).startswith(mounts["models"]["mountPath"] + "/")


@pytest.mark.parametrize("name", NAMES)
def test_running_answers_may_end_before_the_kubelet_kills(
    built: dict[str, list[Manifest]], name: str
) -> None:
    wait = container_of(built[name])["lifecycle"]["preStop"]["sleep"]["seconds"]
    grace = float(settings_of(built[name])["NEURONTUNE_GRACE_SECONDS"])
    assert pod_of(built[name])["terminationGracePeriodSeconds"] > wait + grace + BACKSTOP_SECONDS


@pytest.mark.parametrize("name", NAMES)
def test_probes_ask_routes_of_the_server(built: dict[str, list[Manifest]], name: str) -> None:
    container = container_of(built[name])
    asked = {kind: container[f"{kind}Probe"]["httpGet"] for kind in ("startup", "liveness", "readiness")}
    assert {kind: get["path"] for kind, get in asked.items()} == {
        "startup": "/ready",
        "liveness": "/health",
        "readiness": "/ready",
    }
    assert {get["port"] for get in asked.values()} == {"http"}
    routes = create_app(Settings(engine="fake"), FakeEngine()).openapi()["paths"]
    assert {get["path"] for get in asked.values()} <= set(routes)


def selectors(manifest: Manifest) -> Iterator[dict[str, str]]:
    """Every selector of a manifest that means the server's pods or Service."""
    spec = manifest.get("spec", {})
    if manifest["kind"] == "Service":
        yield spec["selector"]
    if manifest["kind"] == "NetworkPolicy":
        yield spec["podSelector"]["matchLabels"]
    if manifest["kind"] in ("Deployment", "PodDisruptionBudget", "ServiceMonitor"):
        yield spec["selector"]["matchLabels"]
    if manifest["kind"] == "Deployment":
        for one in spec["template"]["spec"]["topologySpreadConstraints"]:
            yield one["labelSelector"]["matchLabels"]


@pytest.mark.parametrize("name", NAMES)
def test_everything_selects_these_pods(built: dict[str, list[Manifest]], name: str) -> None:
    (deployment,) = of_kind(built[name], "Deployment")
    (service,) = of_kind(built[name], "Service")
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    found = [selector for manifest in built[name] for selector in selectors(manifest)]
    assert len(found) >= 6
    for selector in found:
        assert selector.items() <= labels.items()
        assert selector.items() <= service["metadata"]["labels"].items()


@pytest.mark.parametrize("name", NAMES)
def test_only_those_who_are_named_get_in_and_nothing_gets_out(
    built: dict[str, list[Manifest]], name: str
) -> None:
    policies = {each["metadata"]["name"]: each["spec"] for each in of_kind(built[name], "NetworkPolicy")}
    assert policies["neurontune"]["policyTypes"] == ["Ingress", "Egress"]
    assert policies["neurontune"]["egress"] == []
    for spec in policies.values():
        for rule in spec["ingress"]:
            assert rule["ports"] == [{"protocol": "TCP", "port": "http"}]
            assert rule["from"] and all(peer for peer in rule["from"])
    (client,) = policies["neurontune"]["ingress"]
    label = {"matchLabels": {"neurontune-client": "true"}}
    assert client["from"] == [{"podSelector": label}, {"namespaceSelector": label}]
    assert ("neurontune-monitoring" in policies) == (name == "monitored")


@pytest.mark.parametrize("name", NAMES)
def test_what_a_manifest_wants_from_elsewhere_is_documented(
    built: dict[str, list[Manifest]], name: str
) -> None:
    wanted = [
        source.get("secretName") or source.get("claimName")
        for volume in pod_of(built[name])["volumes"]
        for source in volume.values()
        if isinstance(source, dict) and {"secretName", "claimName"} & set(source)
    ]
    wanted += [
        endpoint["authorization"]["credentials"]["name"]
        for monitor in of_kind(built[name], "ServiceMonitor")
        for endpoint in monitor["spec"]["endpoints"]
    ]
    for each in wanted:
        assert f"`{each}`" in PAGE or f" {each} " in PAGE, each


@pytest.mark.parametrize("name", NAMES)
def test_images_have_the_version_of_the_project(built: dict[str, list[Manifest]], name: str) -> None:
    kind = {"base": "cpu", "monitored": "cpu", "gpu": "cuda", "vllm": "vllm"}[name]
    version = assigned(stages()["runtime"], "ARG")["VERSION"]
    assert container_of(built[name])["image"] == f"neurontune:{version}-{kind}"


def test_the_autoscaler_alone_says_how_many(built: dict[str, list[Manifest]]) -> None:
    (deployment,) = of_kind(built["monitored"], "Deployment")
    (scaler,) = of_kind(built["monitored"], "HorizontalPodAutoscaler")
    assert "replicas" not in deployment["spec"]
    assert scaler["spec"]["scaleTargetRef"]["name"] == deployment["metadata"]["name"]


def test_the_autoscaler_asks_for_gauges_of_ours_that_the_adapter_offers(
    built: dict[str, list[Manifest]],
) -> None:
    (scaler,) = of_kind(built["monitored"], "HorizontalPodAutoscaler")
    adapter = yaml.safe_load((PLACE / "components/autoscaling/prometheus-adapter.yaml").read_text())
    offered = {rule["name"]["as"]: rule for rule in adapter["rules"]["custom"]}
    targets = {
        metric["pods"]["metric"]["name"]: float(metric["pods"]["target"]["averageValue"])
        for metric in scaler["spec"]["metrics"]
    }
    assert set(targets) == set(offered)
    for name, rule in offered.items():
        assert TABLE[name.removeprefix("neurontune_")].kind == "gauge"
        assert rule["seriesQuery"].split("{")[0] == name
        assert re.fullmatch(rule["name"]["matches"], name)
    # Of the places that a pod has with the settings here, a fifth is left.
    most = resolved_places(settings_of(built["monitored"]))
    assert 0.75 * most < targets["neurontune_num_requests_running"] < 0.85 * most


def resolved_places(settings: dict[str, str]) -> int:
    """How many requests a pod runs at once."""
    return int(settings.get("NEURONTUNE_MAX_NUM_SEQS", Settings.model_fields["max_num_seqs"].default))


def test_a_model_is_split_into_as_many_parts_as_a_pod_has_gpus(built: dict[str, list[Manifest]]) -> None:
    container = container_of(built["vllm"])
    arguments = container["args"]
    parts = arguments[arguments.index("--tensor-parallel-size") + 1]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == parts
    (deployment,) = of_kind(built["vllm"], "Deployment")
    assert deployment["spec"]["replicas"] > 1


def test_the_rules_of_the_operator_are_those_of_prometheus(built: dict[str, list[Manifest]]) -> None:
    (rule,) = of_kind(built["monitored"], "PrometheusRule")
    files = sorted((ROOT / "deploy" / "prometheus" / "rules").glob("*.yml"))
    groups = [group for file in files for group in yaml.safe_load(file.read_text())["groups"]]
    assert rule["spec"]["groups"] == groups, "run: python deploy/kubernetes/rules.py"


def make_rules(*flags: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, str(PLACE / "rules.py"), *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_the_manifest_of_the_rules_is_what_the_script_writes(tmp_path: Path) -> None:
    assert make_rules("--out", str(tmp_path / "made.yaml")).returncode == 0
    committed = PLACE / "components" / "monitoring" / "prometheusrule.yaml"
    assert (tmp_path / "made.yaml").read_text() == committed.read_text(), (
        "run: python deploy/kubernetes/rules.py"
    )


def test_groups_of_several_files_keep_their_order_and_every_character(tmp_path: Path) -> None:
    first = [{"name": "b", "interval": "30s", "rules": [{"record": "a:b", "expr": 'sum(\n  x{y="z"}\n)\n'}]}]
    second = [
        {"name": "a", "rules": [{"alert": "Höhe", "expr": "up == 0", "for": "5m", "labels": {"n": "1"}}]}
    ]
    for name, groups in (("1.yml", first), ("2.yml", second)):
        (tmp_path / name).write_text(yaml.safe_dump({"groups": groups}))
    out = tmp_path / "made.yaml"
    assert make_rules("--rules", str(tmp_path), "--out", str(out)).returncode == 0
    assert yaml.safe_load(out.read_text())["spec"]["groups"] == first + second
    assert "expr: |" in out.read_text()


def test_a_file_that_is_no_rule_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "test.yml").write_text("rule_files: [a.yml]\n")
    done = make_rules("--rules", str(tmp_path), "--out", str(tmp_path / "made.yaml"))
    assert done.returncode != 0 and "is no rule file" in done.stderr
    assert not (tmp_path / "made.yaml").exists()
