"""The dashboards' files: current, whole, about metrics that exist. Grafana has not drawn them here."""

import json
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard

from deploy.grafana import safety
from deploy.grafana.generate_dashboards import dashboards
from deploy.grafana.panels import dashboard, tile
from deploy.grafana.series import Series
from server.metric_table import TABLE
from tests.deploy.promql import BY_PROMETHEUS, DASHBOARD_FILES, asked, exported, filled, panels, recorded
from tests.deploy.tools import ROOT

PLACE = ROOT / "deploy" / "grafana"
by_name = pytest.mark.parametrize("path", DASHBOARD_FILES, ids=lambda path: path.stem)


def read(path: Path) -> dict[str, Any]:
    found = json.loads(path.read_text())
    assert isinstance(found, dict)
    return found


def test_the_files_are_what_the_generator_makes_now() -> None:
    made = dashboards()
    assert (
        sorted(made) == ["safety.json", "serving.json", "slo.json"] == [path.name for path in DASHBOARD_FILES]
    )
    for path in DASHBOARD_FILES:
        assert path.read_text() == made[path.name], f"{path.name} is out of date: make dashboards"


@by_name
def test_the_sdk_reads_every_field_and_writes_it_again(path: Path) -> None:
    register_default_plugins()
    model = Dashboard.from_json(read(path))
    assert not list(lost(read(path), json.loads(json.dumps(model, cls=JSONEncoder))))


def lost(given: Any, kept: Any, where: str = "") -> Iterator[str]:
    """Where `kept` lacks what is `given`; the SDK may add defaults."""
    if isinstance(given, dict) and isinstance(kept, dict):
        for name, value in given.items():
            yield from lost(value, kept.get(name), f"{where}.{name}")
    elif isinstance(given, list) and isinstance(kept, list) and len(given) == len(kept):
        for number, (one, other) in enumerate(zip(given, kept, strict=True)):
            yield from lost(one, other, f"{where}[{number}]")
    elif given != kept:
        yield f"{where}: {given!r} became {kept!r}"


def test_a_field_that_the_sdk_does_not_know_is_seen_to_be_lost() -> None:
    given = read(DASHBOARD_FILES[0])
    given["panels"][0]["colour"] = "red"
    model = Dashboard.from_json(given)
    (found,) = lost(given, json.loads(json.dumps(model, cls=JSONEncoder)))
    assert found == ".panels[0].colour: 'red' became None"


@by_name
def test_no_two_panels_have_one_id_or_overlap_and_none_stands_out(path: Path) -> None:
    everything = read(path)["panels"]
    assert len({panel["id"] for panel in everything}) == len(everything)
    places = [(one["title"], one["gridPos"]) for one in everything]
    assert all(place["x"] + place["w"] <= 24 for _, place in places)
    for (one, a), (other, b) in combinations(places, 2):
        apart = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"]
        apart = apart or a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"]
        assert apart, (one, other)


@by_name
def test_every_panel_says_what_it_shows_in_which_unit_and_from_which_metrics(path: Path) -> None:
    for panel in panels(path):
        assert panel["title"] and panel["targets"], panel
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        for target in panel["targets"]:
            for selector in asked(filled(target["expr"], values_of(path))).selectors:
                assert f"`{selector.name}`" in panel["description"], panel["title"]


@by_name
def test_panels_and_choices_name_only_series_and_labels_that_exist(path: Path) -> None:
    known = exported() | recorded() | {"up": BY_PROMETHEUS}
    for panel in panels(path):
        for target in panel["targets"]:
            found = asked(filled(target["expr"], values_of(path)))
            for selector in found.selectors:
                assert selector.name in known, (panel["title"], selector.name)
                matched = {each.name for each in selector.matchers.matchers}
                assert matched <= known[selector.name], (panel["title"], selector.name)
            assert found.grouped_by <= set.union(*(known[one.name] for one in found.selectors)), panel[
                "title"
            ]
    for variable in read(path)["templating"]["list"]:
        if variable["type"] == "query":
            metric, _, label = variable["query"].removeprefix("label_values(").rpartition(", ")
            (selector,) = asked(filled(metric, values_of(path))).selectors
            assert label.removesuffix(")") in known[selector.name]


@by_name
def test_what_is_chosen_above_narrows_every_series_that_has_such_a_label(path: Path) -> None:
    for panel in panels(path):
        for target in panel["targets"]:
            for selector in asked(filled(target["expr"], values_of(path))).selectors:
                if selector.name in exported():
                    chosen = {"job", "namespace", "instance", "model_name"} & exported()[selector.name]
                    assert chosen <= {each.name for each in selector.matchers.matchers}, panel["title"]


@by_name
def test_every_dashboard_has_the_same_choices_refreshes_and_leads_to_the_others(path: Path) -> None:
    found = read(path)
    names = [variable["name"] for variable in found["templating"]["list"]]
    assert names[:5] == ["datasource", "job", "namespace", "model_name", "instance"]
    assert found["refresh"] == "30s" and found["tags"] == ["neurontune"]
    (link,) = found["links"]
    assert link["type"] == "dashboards" and link["tags"] == ["neurontune"]
    assert link["keepTime"] and link["includeVars"]
    for panel in panels(path):
        assert panel["datasource"]["uid"] == "${datasource}"


def test_targets_that_can_be_chosen_are_bucket_boundaries() -> None:
    found = {one["name"]: one for one in read(PLACE / "dashboards" / "slo.json")["templating"]["list"]}
    for name, metric in (
        ("ttft", "time_to_first_token_seconds"),
        ("itl", "inter_token_latency_seconds"),
        ("e2e", "e2e_request_latency_seconds"),
    ):
        values = [option["value"] for option in found[f"{name}_target"]["options"]]
        assert len(values) > 5 and set(map(float, values)) <= set(TABLE[metric].buckets)
        # As the label is written: Prometheus compares texts.
        assert all(value == repr(float(value)) for value in values)


def test_a_panel_of_a_metric_that_is_gone_stops_the_generator() -> None:
    table = {name: row for name, row in TABLE.items() if name != "level_denials"}
    with pytest.raises(ValueError, match="no metric level_denials"):
        safety.rows(Series(table, recorded()))


def test_a_panel_of_a_label_or_a_recorded_series_that_is_not_there_stops_the_generator() -> None:
    series = Series(TABLE, recorded())
    with pytest.raises(ValueError, match="no label colour"):
        series.rate("requests", by=("colour",))
    with pytest.raises(ValueError, match="no label colour"):
        series.rate("requests", 'colour="red"')
    with pytest.raises(ValueError, match="is a gauge, not a counter"):
        series.rate("engine_ready")
    with pytest.raises(ValueError, match="No rule records"):
        series.recorded("namespace:neurontune_nothing:rate5m")


def test_panels_that_leave_a_gap_stop_the_generator() -> None:
    panels = [tile("One", "short", "up{}", "About.")]
    with pytest.raises(ValueError, match="is 3 of 24 wide"):
        dashboard("uid", "Title", "About.", {"": panels}, [], "up")


def test_grafana_finds_the_dashboards_and_the_datasource_where_compose_puts_them() -> None:
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    mounted = {Path(volume["target"]) for volume in compose["grafana"]["volumes"] if isinstance(volume, dict)}
    (provider,) = yaml.safe_load((PLACE / "provisioning/dashboards/neurontune.yml").read_text())["providers"]
    assert Path(provider["options"]["path"]) in mounted
    (source,) = yaml.safe_load((PLACE / "provisioning/datasources/prometheus.yml").read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090" and "prometheus" in compose
    config = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())
    assert source["jsonData"]["timeInterval"] == config["global"]["scrape_interval"]


def values_of(path: Path) -> dict[str, str]:
    """A value for each variable that the expressions of a dashboard may use."""
    found = {one["name"]: one for one in read(path)["templating"]["list"] if one["type"] == "custom"}
    chosen = {name: one["current"]["value"] for name, one in found.items()}
    everything = {"job": "neurontune", "namespace": ".*", "model_name": ".*", "instance": ".*"}
    return chosen | everything | {"__rate_interval": "1m", "__range": "1h"}
