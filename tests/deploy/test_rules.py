"""What Prometheus and Alertmanager are given: valid, about metrics that exist, seen to fire or be silent."""

import re
from pathlib import Path

import pytest
import yaml

from deploy.grafana.slo import TARGETS
from server.metric_table import TABLE
from tests.deploy.promql import BY_PROMETHEUS, PROMETHEUS, RULE_FILES, asked, exported, recorded, rules
from tests.deploy.tools import ROOT, output, run, tool

TESTS = sorted((PROMETHEUS / "tests").glob("*.yml"))
MANUAL = ROOT / "docs" / "operations.md"


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_prometheus_accepts_its_configuration_and_the_rules() -> None:
    output([tool("promtool"), "check", "config", str(PROMETHEUS / "prometheus.yml")])
    assert "SUCCESS" in output([tool("promtool"), "check", "rules", *map(str, RULE_FILES)])


def test_alertmanager_accepts_its_configuration() -> None:
    output([tool("amtool"), "check-config", str(PROMETHEUS / "alertmanager.yml")])


@pytest.mark.parametrize("path", TESTS, ids=lambda path: path.stem)
def test_rules_do_what_their_tests_say(path: Path) -> None:
    done = run([tool("promtool"), "test", "rules", str(path)])
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_two_groups_share_a_name_and_what_alerts_look_at_is_recorded_before_them() -> None:
    """promtool evaluates groups in the order listed, and those that are not listed first, in any order:
    an alert that came before what it looks at was silent in some runs of the same test."""
    groups = [group for path in RULE_FILES for group in yaml.safe_load(path.read_text())["groups"]]
    names = [group["name"] for group in groups]
    assert len(set(names)) == len(names)
    recording = {group["name"] for group in groups if all("record" in rule for rule in group["rules"])}
    for path in TESTS:
        order = yaml.safe_load(path.read_text())["group_eval_order"]
        assert sorted(order) == sorted(names), path
        assert set(order[: len(recording)]) == recording, path


def test_every_alert_is_tested_to_fire_and_to_be_silent() -> None:
    cases = [
        case for path in TESTS for test in yaml.safe_load(path.read_text())["tests"]
        for case in test.get("alert_rule_test", [])
    ]  # fmt: skip
    names = {rule["alert"] for rule in rules("alert")}
    assert {case["alertname"] for case in cases if case.get("exp_alerts")} == names
    assert {case["alertname"] for case in cases if not case.get("exp_alerts")} == names


def test_every_alert_says_how_bad_it_is_what_is_wrong_and_where_it_is_written_what_to_do() -> None:
    found = anchors(MANUAL)
    for rule in rules("alert"):
        assert rule["labels"]["severity"] in ("critical", "warning"), rule
        assert set(rule["annotations"]) == {"summary", "description", "runbook_url"}, rule
        page, _, anchor = rule["annotations"]["runbook_url"].partition("#")
        assert ROOT / page == MANUAL and anchor in found, rule["alert"]
        assert rule["alert"].lower() in anchor


def test_rules_name_only_series_and_labels_that_exist() -> None:
    known = exported() | recorded() | {"up": BY_PROMETHEUS}
    for rule in rules("alert") + rules("record"):
        for selector in asked(rule["expr"]).selectors:
            assert selector.name in known, rule
            assert {each.name for each in selector.matchers.matchers} <= known[selector.name], rule
        named = [known[selector.name] for selector in asked(rule["expr"]).selectors]
        assert asked(rule["expr"]).grouped_by <= set.union(*named), rule


def test_what_the_alerts_hold_the_server_to_is_a_bucket_boundary_and_chosen_first_in_the_dashboard() -> None:
    bounds: dict[str, set[str]] = {}
    for rule in rules("record"):
        for selector in asked(rule["expr"]).selectors:
            for each in selector.matchers.matchers:
                if each.name == "le":
                    bounds.setdefault(selector.name, set()).add(each.value)
    shown = {metric: chosen for _, metric, chosen in TARGETS.values()}
    assert len(bounds) == 2
    for name, values in bounds.items():
        (value,) = values
        metric = name.removeprefix("neurontune_").removesuffix("_bucket")
        assert float(value) in TABLE[metric].buckets and float(value) == shown[metric]


def named(matchers: list[str]) -> set[str]:
    """The alerts that matchers of Alertmanager name."""
    found = [re.fullmatch(r'alertname=~?"(.*)"', one) for one in matchers]
    return {name for each in found if each for name in each[1].split("|")}


def test_the_alert_manager_silences_what_one_server_rings_for_by_names_that_exist() -> None:
    """An inhibition whose `equal` both sides lack holds between all of them: every alert about one job would
    silence all others that have no instance."""
    exprs = {rule["alert"]: rule["expr"] for rule in rules("alert")}
    config = yaml.safe_load((PROMETHEUS / "alertmanager.yml").read_text())
    for rule in config["inhibit_rules"]:
        sources, targets = named(rule["source_matchers"]), named(rule["target_matchers"])
        assert sources and targets and not sources & targets
        assert rule["equal"] == ["job", "namespace", "instance"] and 'instance!=""' in rule["source_matchers"]
        for name in targets:
            assert not asked(exprs[name]).grouped_by, f"{name} is of no single instance"
            assert not re.search(r"\w:neurontune_", exprs[name]), f"{name} is of no single instance"
