"""The dashboard *SLO*: how much of what is promised is kept, and how fast the error budget burns.

Knows objectives and burn rates (the SRE workbook's multi-window alerts). Knows no JSON.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from deploy.grafana.panels import Panel, Query, choice, lines, marked, tile
from deploy.grafana.series import RANGE, RATE, Series
from server.metric_table import MetricRow

UID: Final = "neurontune-slo"
TITLE: Final = "NeuronTune: SLO"
ABOUT: Final = (
    "Shares within the targets chosen above, burn rates and error budgets. A burn rate of 1 uses the budget "
    "up exactly when the objective's period ends. The alerts have targets of their own: those shown first."
)
ANSWERS: Final = 'route=~"/v1/(chat/)?completions"'
ERRORS: Final = 'status=~"5.."'
WINDOWS: Final = ("5m", "1h", "6h")
# metric, and the target that is chosen at first: the one that the alerts have (deploy/prometheus/rules).
TARGETS: Final = {
    "ttft": ("Time to first token", "time_to_first_token_seconds", 2.5),
    "itl": ("Inter-token latency", "inter_token_latency_seconds", 0.1),
    "e2e": ("End-to-end latency", "e2e_request_latency_seconds", 30),
}
OBJECTIVES: Final = (0.9, 0.95, 0.99, 0.995, 0.999)
OBJECTIVE: Final = 0.99


def rows(series: Series) -> dict[str, Sequence[Panel]]:
    """The panels, by row."""
    found = {
        title: _row(
            {window: series.within(metric, f"${name}_target", window) for window in (RATE, RANGE, *WINDOWS)},
            "$latency_objective",
            title,
            "Within the target.",
        )
        for name, (title, metric, _) in TARGETS.items()
    }
    kept = {window: f"1 - {failing(series, window)}" for window in (RATE, RANGE, *WINDOWS)}
    return found | {
        "Availability": _row(
            kept,
            "$availability_objective",
            "Availability",
            "Requests for answers that got no 5xx, had time enough, and did not break off.",
        )
    }


def targets(table: Mapping[str, MetricRow], *names: str) -> Iterator[Any]:
    """Variables for the targets of these names, or of all. A target must be a boundary of its histogram."""
    for name, (title, metric, chosen) in TARGETS.items():
        if not names or name in names:
            bounds = [bound for bound in table[metric].buckets if chosen / 25 <= bound <= chosen * 20]
            values = {_seconds(bound): str(float(bound)) for bound in bounds}
            yield choice(
                f"{name}_target", f"{name.upper()} target", f"{title}: within", values, str(float(chosen))
            )


def objectives() -> Iterator[Any]:
    """Variables for the shares that are promised."""
    values = {f"{objective * 100:g} %": f"{objective:g}" for objective in OBJECTIVES}
    for name in ("latency", "availability"):
        about = f"The share that is promised: {name}"
        yield choice(f"{name}_objective", f"{name.capitalize()} objective", about, values, f"{OBJECTIVE:g}")


def failing(series: Series, window: str = RATE) -> str:
    """The share of failures: 5xx and out of time, of the requests for answers; or broken off, of the answers.

    The greater of the two: a stream's failure shows in the second alone, one before its beginning in both.
    """
    asked = series.rate("http_requests", ANSWERS, window=window)
    parts = (
        series.rate("http_requests", ANSWERS, ERRORS, window=window),
        series.rate("deadlines_exceeded", window=window),
    )
    failed = " + ".join(f"({part} or 0 * {asked})" for part in parts)
    failed = f"({failed}) / ({asked} > 0)"
    broken = series.rate("request_success", 'finished_reason="error"', window=window)
    broken = series.share(broken, series.rate("request_success", window=window))
    return f"clamp_max({failed} >= {broken} or {broken} or {failed}, 1)"


def _row(kept: Mapping[str, str], objective: str, title: str, about: str) -> Sequence[Panel]:
    """The panels of one objective. `kept` is the share that keeps it, by window."""
    burn = {window: f"(1 - ({share})) / (1 - {objective})" for window, share in kept.items()}
    return (
        tile(f"{title}: kept", "percentunit", kept[RANGE], f"{about} In the time shown.", width=6),
        tile(
            f"{title}: budget left",
            "percentunit",
            f"1 - {burn[RANGE]}",
            f"{about} What is left of the failures that are allowed in the time shown; below 0: more were.",
            width=6,
            color="red",
            steps=[(0, "yellow"), (0.5, "green")],
        ),
        tile(
            f"{title}: burn rate, 1 h",
            "short",
            burn["1h"],
            f"{about} How many times faster than allowed the budget is used, over an hour.",
            width=6,
            steps=[(1, "yellow"), (14.4, "red")],
        ),
        tile(
            f"{title}: burn rate, 6 h",
            "short",
            burn["6h"],
            f"{about} How many times faster than allowed the budget is used, over six hours.",
            width=6,
            steps=[(1, "yellow"), (6, "red")],
        ),
        *_over_time(kept[RATE], burn, title, about),
    )


def _over_time(kept: str, burn: Mapping[str, str], title: str, about: str) -> Sequence[Panel]:
    return (
        lines(f"{title}: kept over time", "percentunit", about, Query(kept, "kept"), width=12),
        marked(
            lines(
                f"{title}: burn rates",
                "short",
                f"{about} How many times faster than allowed the budget is used. Above 14.4 over an hour and "
                "five minutes it lasts two days of a month.",
                *(Query(burn[window], window) for window in WINDOWS),
                width=12,
            ),
            (1, "yellow"),
            (14.4, "red"),
        ),
    )


def _seconds(bound: float) -> str:
    return f"{bound:g} s" if bound >= 1 else f"{bound * 1000:g} ms"
