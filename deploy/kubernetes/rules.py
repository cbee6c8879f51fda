"""Prometheus' rule files as the manifest that the Prometheus operator reads.

Knows the layout of both. Knows nothing of what the rules say. Run it after a change of a rule:
`python deploy/kubernetes/rules.py`.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
RULES = HERE.parent / "prometheus" / "rules"
MANIFEST = HERE / "components" / "monitoring" / "prometheusrule.yaml"
HEADING = (
    "# Made from deploy/prometheus/rules by deploy/kubernetes/rules.py: change the rules, then run it.\n"
)


class _Dumper(yaml.SafeDumper):
    """Expressions of several lines stay so."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)


def manifest(folder: Path) -> str:
    """The PrometheusRule of every group in the `*.yml` of `folder`, files by name.

    Raises:
        ValueError: one of them is no rule file.
    """
    groups = [group for path in sorted(folder.glob("*.yml")) for group in _groups(path)]
    rule = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "neurontune", "labels": {"app.kubernetes.io/name": "neurontune"}},
        "spec": {"groups": groups},
    }
    return HEADING + yaml.dump(rule, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


def _groups(path: Path) -> list[Any]:
    content = yaml.safe_load(path.read_text())
    if not isinstance(content, dict) or not isinstance(content.get("groups"), list):
        raise ValueError(f"{path} is no rule file: it must hold `groups:` and under it a list of them.")
    return content["groups"]


def main() -> None:
    """Write the manifest."""
    parser = argparse.ArgumentParser(description="Write the PrometheusRule from the rule files.")
    parser.add_argument("--rules", type=Path, default=RULES, help="Folder of the rule files.")
    parser.add_argument("--out", type=Path, default=MANIFEST, help="File to write.")
    flags = parser.parse_args()
    try:
        made = manifest(flags.rules)
    except ValueError as error:
        sys.exit(str(error))
    flags.out.write_text(made)


if __name__ == "__main__":
    main()
