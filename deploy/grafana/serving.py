"""The dashboard *Serving*: throughput, latency, saturation and errors, arranged as in vLLM's overview.

Knows what operators of inference servers look for. Knows no JSON.
"""

from collections.abc import Sequence
from typing import Final

from deploy.grafana.panels import Panel, Query, grid, heat, lines, tile
from deploy.grafana.series import RATE, Series
from deploy.grafana.slo import ANSWERS, failing

UID: Final = "neurontune-serving"
TITLE: Final = "NeuronTune: serving"
ABOUT: Final = "Throughput, latency, saturation and errors, with vLLM's meaning of each."
LATENCIES: Final = {
    "Time to first token": ("time_to_first_token_seconds", "From a request's arrival to its first token."),
    "Inter-token latency": ("inter_token_latency_seconds", "Between two tokens of an answer."),
    "Time per output token": (
        "request_time_per_output_token_seconds",
        "Of a completed answer, decoding time per token after the first.",
    ),
    "End-to-end latency": (
        "e2e_request_latency_seconds",
        "From a request's arrival to the end of its completed answer.",
    ),
    "Queue time": (
        "request_queue_time_seconds",
        "In the engine, before an answer's first step. Up to 0.3 s is one bucket: there the mean tells more.",
    ),
}
PHASES: Final = {
    "queue": "request_queue_time_seconds",
    "prefill": "request_prefill_time_seconds",
    "decode": "request_decode_time_seconds",
    "inference (prefill and decode)": "request_inference_time_seconds",
}


def rows(series: Series) -> dict[str, Sequence[Panel]]:
    """The panels, by row."""
    return {
        "": _tiles(series),
        "Models": _models(series),
        "Latency": _latency(series),
        "Throughput": _throughput(series),
        "Saturation": _saturation(series),
        "Caching": _caching(series),
        "Workload": _workload(series),
        "API server": _api(series),
    }


def _tiles(series: Series) -> Sequence[Panel]:
    asked = series.rate("http_requests", ANSWERS)
    hits, queries = series.rate("prefix_cache_hits"), series.rate("prefix_cache_queries")
    within = "Share of the last step's observations within the target that is chosen above."
    return (
        tile("Requests", "reqps", asked, "Requests for answers per second."),
        tile("Input tokens", "short", series.rate("prompt_tokens"), "Tokens of prompts per second."),
        tile("Output tokens", "short", series.rate("generation_tokens"), "Tokens generated per second."),
        tile(
            "Errors",
            "percentunit",
            failing(series),
            "Of requests for answers, those that got a 5xx, ran out of time or broke off.",
            steps=[(0.01, "yellow"), (0.05, "red")],
        ),
        *(
            tile(f"{name} p95", "s", series.quantile(0.95, metric), f"{about} 95 of 100 are faster.")
            for name, (metric, about) in zip(
                ("TTFT", "ITL", "E2E", "Queue"),
                [each for name, each in LATENCIES.items() if name != "Time per output token"],
                strict=True,
            )
        ),
        tile(
            "Unreachable",
            "short",
            f"count({series.up(0)}) or vector(0)",
            "Servers that Prometheus cannot scrape.",
            steps=[(1, "red")],
        ),
        tile(
            "Engines",
            "short",
            f"sum({series.gauge('engine_ready')})",
            "Engines that take requests.",
            color="red",
            steps=[(1, "green")],
        ),
        tile(
            "Running",
            "short",
            f"sum({series.gauge('num_requests_running')})",
            "Answers that are being generated.",
        ),
        tile(
            "Waiting",
            "short",
            f"sum({series.gauge('num_requests_waiting')})",
            "Answers that wait in the engine.",
            steps=[(10, "yellow")],
        ),
        tile(
            "KV cache",
            "percentunit",
            f"avg({series.gauge('kv_cache_usage_perc')})",
            "Share of the KV cache that running answers hold.",
            steps=[(0.8, "yellow"), (0.95, "red")],
        ),
        tile(
            "Prefix hits",
            "percentunit",
            series.share(hits, queries),
            "Of the prompts' tokens that were looked up, those found in the prefix cache.",
        ),
        tile(
            "TTFT in target",
            "percentunit",
            series.within("time_to_first_token_seconds", "$ttft_target"),
            within,
        ),
        tile(
            "ITL in target",
            "percentunit",
            series.within("inter_token_latency_seconds", "$itl_target"),
            within,
        ),
    )


def _models(series: Series) -> Sequence[Panel]:
    by = ("model_name",)
    return (
        grid(
            "Models",
            "What each model does now.",
            {
                "Answers/s": (series.rate("request_success", by=by), "reqps"),
                "Output tokens/s": (series.rate("generation_tokens", by=by), "short"),
                "TTFT p95": (series.quantile(0.95, "time_to_first_token_seconds", by=by), "s"),
                "ITL p95": (series.quantile(0.95, "inter_token_latency_seconds", by=by), "s"),
                "E2E p95": (series.quantile(0.95, "e2e_request_latency_seconds", by=by), "s"),
                "Running": (f"sum by (model_name) ({series.gauge('num_requests_running')})", "short"),
                "Waiting": (f"sum by (model_name) ({series.gauge('num_requests_waiting')})", "short"),
                "KV cache": (f"avg by (model_name) ({series.gauge('kv_cache_usage_perc')})", "percentunit"),
                "Ready": (f"sum by (model_name) ({series.gauge('engine_ready')})", "short"),
            },
        ),
    )


def _latency(series: Series) -> Sequence[Panel]:
    heats = ("Time to first token", "Inter-token latency", "End-to-end latency")
    return (
        *(
            lines(
                title,
                "s",
                about,
                *(Query(series.quantile(q, metric), f"p{q * 100:g}") for q in (0.5, 0.95, 0.99)),
                Query(series.mean(metric), "mean"),
            )
            for title, (metric, about) in LATENCIES.items()
        ),
        lines(
            "Mean time by phase",
            "s",
            "Where an answer's time goes, on average.",
            *(Query(series.mean(metric), phase) for phase, metric in PHASES.items()),
        ),
        *(heat(title, "s", LATENCIES[title][1], series.buckets(LATENCIES[title][0])) for title in heats),
    )


def _throughput(series: Series) -> Sequence[Panel]:
    return (
        lines(
            "Tokens",
            "short",
            "Tokens per second: of prompts, and generated.",
            Query(series.rate("prompt_tokens"), "input"),
            Query(series.rate("generation_tokens"), "output"),
            width=12,
        ),
        lines(
            "Answers by what ended them",
            "reqps",
            "Answers per second: at their end (`stop`), at their limit (`length`), client gone or out of "
            "time (`abort`), failed (`error`).",
            Query(series.rate("request_success", by=("finished_reason",)), "{{finished_reason}}"),
            width=12,
        ),
    )


def _saturation(series: Series) -> Sequence[Panel]:
    rejected = series.rate("admission_rejections", by=("reason",))
    return (
        lines(
            "Running and waiting",
            "short",
            "Answers in the engine.",
            Query(f"sum({series.gauge('num_requests_running')})", "running"),
            Query(f"sum({series.gauge('num_requests_waiting')})", "waiting"),
        ),
        lines(
            "KV cache",
            "percentunit",
            "Share of the KV cache that running answers hold, by server.",
            Query(f"avg by (instance) ({series.gauge('kv_cache_usage_perc')})", "{{instance}}"),
        ),
        lines(
            "Turned away",
            "reqps",
            "Requests per second that found no place or no rate (429), and those that ran out of time (408).",
            Query(rejected, "{{reason}}"),
            Query(series.rate("deadlines_exceeded"), "deadline"),
        ),
    )


def _caching(series: Series) -> Sequence[Panel]:
    hits, queries = (
        series.rate(name, by=("model_name",)) for name in ("prefix_cache_hits", "prefix_cache_queries")
    )
    return (
        lines(
            "Prefix cache hits",
            "percentunit",
            "Of the prompts' tokens that were looked up, those found. Levels share no prefixes.",
            Query(series.share(hits, queries), "{{model_name}}"),
            width=12,
        ),
        lines(
            "Prompt tokens by source",
            "short",
            "Tokens of prompts per second: found in the cache, and computed.",
            Query(series.rate("prompt_tokens_cached"), "cached"),
            Query(f"{series.rate('prompt_tokens')} - {series.rate('prompt_tokens_cached')}", "computed"),
            width=12,
            stacked=True,
        ),
    )


def _workload(series: Series) -> Sequence[Panel]:
    lengths = {
        "Prompt length": ("request_prompt_tokens", "Tokens of a completed answer's prompt."),
        "Answer length": ("request_generation_tokens", "Tokens of a completed answer."),
    }
    return (
        *(
            lines(
                title,
                "short",
                about,
                *(Query(series.quantile(q, metric), f"p{q * 100:g}") for q in (0.5, 0.95)),
                Query(series.mean(metric), "mean"),
            )
            for title, (metric, about) in lengths.items()
        ),
        lines(
            "Share of what ended answers",
            "percentunit",
            "Of all answers that ended.",
            Query(series.rate("request_success", by=("finished_reason",)), "{{finished_reason}}"),
            stacked=True,
        ),
        *(
            heat(f"{title}s", "short", about, series.buckets(metric), width=12)
            for title, (metric, about) in lengths.items()
        ),
    )


def _api(series: Series) -> Sequence[Panel]:
    return (
        lines(
            "HTTP by status",
            "reqps",
            "Requests per second, by status. 499: the client left before its answer.",
            Query(series.rate("http_requests", by=("status",)), "{{status}}"),
        ),
        lines(
            "HTTP by route",
            "reqps",
            "Requests per second, by route.",
            Query(series.rate("http_requests", by=("route",)), "{{route}}"),
        ),
        lines(
            "Mean duration by route",
            "s",
            "From a request's arrival to the last byte of its answer.",
            Query(series.mean("http_request_duration_seconds", by=("route",)), "{{route}}"),
        ),
        lines(
            "Engine restarts",
            "short",
            "Rebuilds of the engine after a failure, in each step, by server.",
            Query(
                series.increase("engine_restarts", by=("instance",), window=RATE),
                "{{instance}}",
            ),
            width=12,
        ),
        lines(
            "Ready",
            "short",
            "1 where the engine takes requests.",
            Query(f"min by (instance) ({series.gauge('engine_ready')})", "{{instance}}"),
            width=12,
        ),
    )
