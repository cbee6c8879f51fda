"""PromQL of rules and panels, read by another parser than Prometheus': which series it asks for."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import promql_parser
import yaml

from server.metric_table import TABLE
from tests.deploy.tools import ROOT

PROMETHEUS = ROOT / "deploy" / "prometheus"
RULE_FILES = sorted((PROMETHEUS / "rules").glob("*.yml"))
DASHBOARD_FILES = sorted((ROOT / "deploy" / "grafana" / "dashboards").glob("*.json"))
COMPARISONS = {"==", "!=", "<", "<=", ">", ">="}
SUFFIXES = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}
BY_PROMETHEUS = {"job", "namespace", "instance"}


@dataclass
class Asked:
    """What one expression asks for: its selectors, and the labels that it groups by."""

    selectors: list[promql_parser.VectorSelector] = field(default_factory=list)
    grouped_by: set[str] = field(default_factory=set)

    def labels(self) -> set[str]:
        """Every label that it names."""
        matched = {each.name for one in self.selectors for each in one.matchers.matchers}
        return matched | self.grouped_by


def asked(expr: str) -> Asked:
    """Parse `expr`, which holds no variables."""
    found = Asked()

    def visit(node: Any) -> bool:
        if isinstance(node, promql_parser.VectorSelector):
            found.selectors.append(node)
        if isinstance(node, promql_parser.AggregateExpr) and node.modifier is not None:
            found.grouped_by |= set(node.modifier.labels)
        return True

    promql_parser.walk(promql_parser.parse(expr), visit)
    return found


def compared(expr: str) -> list[str]:
    """Both sides of each comparison in `expr` that ask for series. Not `absent`: it mostly has none."""
    found: list[str] = []

    def visit(node: Any) -> bool:
        if isinstance(node, promql_parser.BinaryExpr) and str(node.op) in COMPARISONS:
            sides = [side.prettify() for side in (node.lhs, node.rhs)]
            found.extend(side for side in sides if asked(side).selectors and not side.startswith("absent("))
        return True

    promql_parser.walk(promql_parser.parse(expr), visit)
    return found


def filled(expr: str, values: Mapping[str, str]) -> str:
    """`expr` with values for its variables, `$name`; it must use no other."""
    return re.sub(r"\$(\w+)", lambda found: values[found[1]], expr)


def exported() -> dict[str, set[str]]:
    """Every series name that the server exports, and its labels, as Prometheus keeps them."""
    of_table = {
        row.name + suffix: {*row.labels, *BY_PROMETHEUS, *(("le",) if suffix == "_bucket" else ())}
        for row in TABLE.values()
        for suffix in SUFFIXES[row.kind]
    }
    return of_table | {"process_start_time_seconds": BY_PROMETHEUS}  # the client library's


def rules(kind: str) -> list[dict[str, Any]]:
    """Every rule of the rule files that has a `kind`: `alert` or `record`."""
    groups = [group for path in RULE_FILES for group in yaml.safe_load(path.read_text())["groups"]]
    return [rule for group in groups for rule in group["rules"] if kind in rule]


def recorded() -> dict[str, set[str]]:
    """Every series name that is recorded, and its labels."""
    return {rule["record"]: set(re.findall(r"\w+", by_of(rule["expr"]))) for rule in rules("record")}


def by_of(expr: str) -> str:
    """By what an expression's sums are grouped; all of one expression agree."""
    (by,) = set(re.findall(r"by \((.*?)\)", expr))
    return str(by)


def panels(path: Path) -> Iterator[dict[str, Any]]:
    """Every panel of a dashboard but its rows."""
    return (panel for panel in json.loads(path.read_text())["panels"] if panel["type"] != "row")
