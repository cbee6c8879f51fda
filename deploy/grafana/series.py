"""PromQL over the metrics that the server exports: a name or label that it does not have is an error.

Knows the metric table and the variables that every dashboard has. Knows no panel and no dashboard.
"""

import re
from collections.abc import Collection, Mapping
from typing import Final

from server.metric_table import MetricRow

RATE: Final = "$__rate_interval"
RANGE: Final = "$__range"
# On everything that is scraped; outside Kubernetes without a namespace.
TARGETS: Final = ("job", "namespace", "instance")


class Series:
    """Expressions over the metrics of `table`, named without prefix; `recorded` are names that rules record.

    All are of the jobs, instances and models that are chosen above the dashboard. `matchers` are written as
    in PromQL: `result="failure"`. Everything raises ValueError for what is not there.
    """

    def __init__(self, table: Mapping[str, MetricRow], recorded: Collection[str]) -> None:
        self._table = table
        self._recorded = recorded

    def gauge(self, name: str, *matchers: str) -> str:
        """A gauge's series, each by itself."""
        return self._selector(self._row(name, "gauge"), "", matchers)

    def name(self, name: str) -> str:
        """A gauge's whole name."""
        return self._row(name, "gauge").name

    def rate(self, name: str, *matchers: str, by: tuple[str, ...] = (), window: str = RATE) -> str:
        """How much a counter grows a second, summed."""
        return self._sum("rate", self._row(name, "counter"), "_total", matchers, by, window)

    def increase(self, name: str, *matchers: str, by: tuple[str, ...] = (), window: str = RANGE) -> str:
        """By how much a counter has grown in `window`, summed."""
        return self._sum("increase", self._row(name, "counter"), "_total", matchers, by, window)

    def share(self, part: str, whole: str) -> str:
        """`part` of `whole`, vectors with the same labels: 0 without a part, nothing without a whole."""
        return f"({part} or 0 * {whole}) / ({whole} > 0)"

    def buckets(self, name: str, window: str = RATE) -> str:
        """A histogram's buckets, by how much they grow in `window`: for heatmaps."""
        return self._sum("increase", self._row(name, "histogram"), "_bucket", (), ("le",), window)

    def quantile(self, quantile: float, name: str, *, by: tuple[str, ...] = (), window: str = RATE) -> str:
        """A histogram's quantile over `window`."""
        rates = self._sum("rate", self._row(name, "histogram"), "_bucket", (), (*by, "le"), window)
        return f"histogram_quantile({quantile:g}, {rates})"

    def mean(self, name: str, *, by: tuple[str, ...] = (), window: str = RATE) -> str:
        """A histogram's mean over `window`."""
        row = self._row(name, "histogram")
        total, number = (self._sum("rate", row, each, (), by, window) for each in ("_sum", "_count"))
        return f"{total} / {number}"

    def within(self, name: str, bound: str, window: str = RATE) -> str:
        """The share of a histogram's observations that are at most `bound`, one of its boundaries."""
        row = self._row(name, "histogram")
        below = self._sum("rate", row, "_bucket", (f'le="{bound}"',), (), window)
        return f"{below} / ({self._sum('rate', row, '_count', (), (), window)} > 0)"

    def recorded(self, name: str) -> str:
        """The series that a recording rule makes."""
        if name not in self._recorded:
            raise ValueError(f"No rule records {name}; recorded are {', '.join(sorted(self._recorded))}.")
        kept = "" if name.startswith("namespace:") else ',model_name=~"$model_name"'
        return f'{name}{{job=~"$job",namespace=~"$namespace"{kept}}}'

    def up(self, value: int) -> str:
        """Prometheus' own: whom it can reach (1), or cannot (0)."""
        return f'up{{job=~"$job",namespace=~"$namespace",instance=~"$instance"}} == {value}'

    def _row(self, name: str, kind: str) -> MetricRow:
        row = self._table.get(name)
        if row is None:
            raise ValueError(f"The server exports no metric {name}; it has {', '.join(sorted(self._table))}.")
        if row.kind != kind:
            raise ValueError(f"{name} is a {row.kind}, not a {kind}.")
        return row

    def _sum(
        self,
        function: str,
        row: MetricRow,
        suffix: str,
        matchers: tuple[str, ...],
        by: tuple[str, ...],
        window: str,
    ) -> str:
        _check(row, by)
        grouped = f" by ({', '.join(by)})" if by else ""
        return f"sum{grouped} ({function}({self._selector(row, suffix, matchers)}[{window}]))"

    def _selector(self, row: MetricRow, suffix: str, matchers: tuple[str, ...]) -> str:
        _check(row, [re.split(r"[=!]", matcher)[0] for matcher in matchers])
        chosen = [name for name in (*TARGETS, "model_name") if name in (*TARGETS, *row.labels)]
        asked = [f'{name}=~"${name}"' for name in chosen]
        return f"{row.name}{suffix}{{{','.join([*asked, *matchers])}}}"


def _check(row: MetricRow, labels: Collection[str]) -> None:
    known = (*row.labels, *TARGETS, *(("le",) if row.kind == "histogram" else ()))
    for label in labels:
        if label not in known:
            raise ValueError(f"{row.name} has no label {label}; it has {', '.join(known)}.")
