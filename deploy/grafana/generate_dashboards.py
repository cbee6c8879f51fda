"""Grafana's dashboards, written from the metric table: `python -m deploy.grafana.generate_dashboards`.

Knows where the dashboards lie and which rules record what. A panel that names what the server does not
export stops it. Run it after a change of a panel or of the table: a test says when they are out of date.
"""

import argparse
import json
from pathlib import Path
from typing import Any, Final

import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder

from deploy.grafana import safety, serving, slo
from deploy.grafana.panels import dashboard
from deploy.grafana.series import Series
from server.metric_table import TABLE

HERE: Final = Path(__file__).parent
RULES: Final = HERE.parent / "prometheus" / "rules"
DASHBOARDS: Final = HERE / "dashboards"


def dashboards() -> dict[str, str]:
    """The text of every dashboard, by the name of its file."""
    series = Series(TABLE, recorded_names(RULES))
    present = series.name("engine_ready")
    variables: dict[Any, list[Any]] = {
        safety: [],
        serving: list(slo.targets(TABLE, "ttft", "itl")),
        slo: [*slo.targets(TABLE), *slo.objectives()],
    }
    found = {}
    for kind, chosen in variables.items():
        model = dashboard(kind.UID, kind.TITLE, kind.ABOUT, kind.rows(series), chosen, present)
        text = json.dumps(model, cls=JSONEncoder, indent=2, sort_keys=True)
        found[f"{kind.UID.removeprefix('neurontune-')}.json"] = f"{text}\n"
    return found


def recorded_names(folder: Path) -> set[str]:
    """What the rule files in `folder` record."""
    groups = [group for path in folder.glob("*.yml") for group in yaml.safe_load(path.read_text())["groups"]]
    return {rule["record"] for group in groups for rule in group["rules"] if "record" in rule}


def main() -> None:
    """Write the dashboards."""
    parser = argparse.ArgumentParser(description="Write Grafana's dashboards from the metric table.")
    parser.add_argument("--out", type=Path, default=DASHBOARDS, help="Folder to write to.")
    folder = parser.parse_args().out
    for name, text in dashboards().items():
        (folder / name).write_text(text)


if __name__ == "__main__":
    main()
