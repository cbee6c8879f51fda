"""The dashboard *Safety*: levels asked for and applied, what is refused and denied, which mask is in force.

Knows what operators of safety levels want to see. Knows no JSON.
"""

from collections.abc import Sequence
from typing import Final

from deploy.grafana.panels import Panel, Query, grid, heat, lines, tile
from deploy.grafana.series import RATE, Series

UID: Final = "neurontune-safety"
TITLE: Final = "NeuronTune: safety"
ABOUT: Final = "Levels asked for and applied, refusals, denials, the mask in force, and what modulation does."


def rows(series: Series) -> dict[str, Sequence[Panel]]:
    """The panels, by row."""
    return {
        "": _tiles(series),
        "Levels": _levels(series),
        "Refusals and denials": _refusals(series),
        "Mask": _mask(series),
        "Modulation": _modulation(series),
        "Audit": _audit(series),
    }


def _tiles(series: Series) -> Sequence[Panel]:
    requests = series.rate("requests")
    default = series.rate("requests", 'level_asked="default"')
    apart = "job, namespace, model_name"
    masks = f"count by ({apart}, digest) ({series.gauge('mask_info')})"
    masks = f"max(count by ({apart}) ({masks}))"
    failed = series.increase("mask_reloads", 'result="failure"')
    return (
        tile("Requests", "reqps", requests, "Requests that got a level, per second."),
        tile(
            "Without a wish", "percentunit", series.share(default, requests), "Share that asked for no level."
        ),
        tile(
            "Refused",
            "percentunit",
            series.share(series.rate("refusals"), series.rate("answers")),
            "Share of the completed answers that begin like a refusal.",
        ),
        tile(
            "Denied",
            "short",
            f"{series.increase('level_denials')} or vector(0)",
            "Requests that were not given the level they asked for, in the time shown.",
            steps=[(1, "yellow")],
        ),
        tile(
            "Masks in force",
            "short",
            masks,
            "Different masks in force at once, of one model at most. With two, a level means two things.",
            steps=[(2, "red")],
        ),
        tile(
            "Failed reloads",
            "short",
            f"{failed} or vector(0)",
            "Masks that could not be put in force, in the time shown.",
            steps=[(1, "red")],
        ),
        tile(
            "Active neurons",
            "short",
            series.mean("active_neurons"),
            "Neurons of both sets that are active for a request, on average.",
        ),
        tile(
            "Audit lines lost",
            "short",
            series.increase("audit_failures"),
            "Lines of the audit log that could not be written, in the time shown.",
            steps=[(1, "red")],
        ),
    )


def _levels(series: Series) -> Sequence[Panel]:
    applied = series.rate("requests", by=("level_applied",))
    pairs = series.increase("requests", by=("level_asked", "level_applied"))
    return (
        lines(
            "Requests by level applied",
            "reqps",
            "Requests per second, by the level that they got. Numbers count as `custom`.",
            Query(applied, "{{level_applied}}"),
        ),
        lines(
            "Requests by level asked",
            "reqps",
            "Requests per second, by the level that they asked for; `default`: for none.",
            Query(series.rate("requests", by=("level_asked",)), "{{level_asked}}"),
        ),
        lines(
            "Share of levels",
            "percentunit",
            "Of all requests, how many got each level.",
            Query(applied, "{{level_applied}}"),
            stacked=True,
        ),
        grid(
            "Asked and applied",
            "Requests in the time shown, by the level asked for and the level applied.",
            {"Requests": (pairs, "short")},
        ),
    )


def _refusals(series: Series) -> Sequence[Panel]:
    refused, answers = (series.rate(name, by=("level_applied",)) for name in ("refusals", "answers"))
    hourly = series.recorded("namespace_model_level:neurontune_refusals:ratio_increase1h")
    return (
        lines(
            "Refusal rate by level",
            "percentunit",
            "Completed answers that begin like a refusal; each of several choices is an answer.",
            Query(series.share(refused, answers), "{{level_applied}}"),
        ),
        lines(
            "Refusal rate, now and a day before",
            "percentunit",
            "Refusals' share of an hour, and of the same hour yesterday: what RefusalRateShift compares.",
            Query(hourly, "{{level_applied}}"),
            Query(f"{hourly} offset 1d", "{{level_applied}}, a day before"),
        ),
        lines(
            "Denials by reason",
            "reqps",
            "Requests per second that were not given their level: below the key's floor (`forbidden`), no "
            "such level (`invalid`), several that disagree (`conflict`).",
            Query(series.rate("level_denials", by=("reason",)), "{{reason}}"),
        ),
    )


def _mask(series: Series) -> Sequence[Panel]:
    info = series.gauge("mask_info")
    return (
        grid(
            "Mask in force",
            "The mask that each server applies, and the method that it was made by.",
            {"In force": (info, "short")},
            hidden=["__name__"],
        ),
        lines(
            "Servers by mask",
            "short",
            "How many servers have each mask in force. It was changed where one line ends, one begins.",
            Query(
                f"count by (namespace, model_name, digest) ({info})",
                "{{namespace}} {{model_name}} {{digest}}",
            ),
            width=12,
        ),
        lines(
            "Mask changes",
            "short",
            "Masks put in force (`success`, the same one again too) and refused (`failure`), in each step.",
            Query(series.increase("mask_reloads", by=("result",), window=RATE), "{{result}}"),
            width=12,
        ),
    )


def _modulation(series: Series) -> Sequence[Panel]:
    steps = series.mean("step_distinct_levels")
    return (
        heat(
            "Active neurons",
            "short",
            "How many neurons of both sets are active for a request.",
            series.buckets("active_neurons"),
        ),
        lines(
            "Distinct levels in a step",
            "short",
            "How many different thresholds the engine serves in one step.",
            Query(series.quantile(0.95, "step_distinct_levels"), "p95"),
            Query(steps, "mean"),
        ),
        lines(
            "Seconds of modulation in a step",
            "s",
            "Time that modulation takes of a step, of one step in 64.",
            Query(series.quantile(0.5, "modulation_step_seconds"), "p50"),
            Query(series.quantile(0.95, "modulation_step_seconds"), "p95"),
            Query(series.mean("modulation_step_seconds"), "mean"),
        ),
    )


def _audit(series: Series) -> Sequence[Panel]:
    forbidden = series.rate("http_requests", 'status="403"')
    below = series.rate("level_denials", 'reason="forbidden"')
    return (
        lines(
            "Audit lines lost",
            "short",
            "Lines of the audit log that could not be written, in each step, by server.",
            Query(series.increase("audit_failures", by=("instance",), window=RATE), "{{instance}}"),
            width=12,
        ),
        lines(
            "Failed authentication",
            "reqps",
            "Requests per second without a valid key (401), or not allowed to a key, host or origin (403). "
            "Those below the key's floor are 403 too, and are not counted here: see denials.",
            Query(series.rate("http_requests", 'status="401"', by=("route",)), "401 {{route}}"),
            Query(f"clamp_min({forbidden} - {below}, 0)", "403"),
            width=12,
        ),
    )
