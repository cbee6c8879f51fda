"""Every metric that the server exports, in one table: its name, kind, labels, buckets and meaning.

Knows names and numbers. Knows no Prometheus client, no engine, no route: whoever shows or checks metrics can
read this alone. Names, meanings and buckets that vLLM has too are vLLM's, so that people find what they know.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal

from server.engines.base import MODULATION_BOUNDS, STEP_LEVEL_BOUNDS

PREFIX: Final = "neurontune_"

FIRST_TOKEN_BUCKETS: Final = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40),
    *(80, 160, 640, 2560),
)
INTER_TOKEN_BUCKETS: Final = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80),
)
REQUEST_BUCKETS: Final = (
    *(0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680),
)
TOKEN_BUCKETS: Final = tuple(digit * 10**power for power in range(6) for digit in (1, 2, 5))
NEURON_BUCKETS: Final = (0, *TOKEN_BUCKETS)
HTTP_BUCKETS: Final = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1,
    2.5,
    5,
    10,
    30,
    60,
    120,
    300,
    600,
)

MODEL: Final = ("model_name",)


@dataclass(frozen=True, slots=True)
class MetricRow:
    """One metric. `name` is without the `_total` that a counter has on the wire; `buckets` are a histogram's
    upper bounds, without +Inf."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = MODEL
    buckets: tuple[float, ...] = ()

    @property
    def wire_name(self) -> str:
        """As Prometheus sees it: of a histogram the name that `_bucket`, `_sum` and `_count` follow."""
        return f"{self.name}_total" if self.kind == "counter" else self.name


def _gauge(name: str, help: str, *labels: str) -> MetricRow:
    return MetricRow(PREFIX + name, "gauge", help, (*labels, *MODEL))


def _counter(name: str, help: str, *labels: str) -> MetricRow:
    return MetricRow(PREFIX + name, "counter", help, (*labels, *MODEL))


def _histogram(name: str, buckets: tuple[float, ...], help: str) -> MetricRow:
    return MetricRow(PREFIX + name, "histogram", help, MODEL, buckets)


_ROWS: Final = (
    # Of vLLM's meaning.
    _gauge("num_requests_running", "Answers that are being generated."),
    _gauge("num_requests_waiting", "Answers that wait in the engine to be generated."),
    _gauge("kv_cache_usage_perc", "Share of the KV cache that running requests hold, 0 to 1."),
    _counter("prompt_tokens", "Tokens of prompts whose answer began, cached ones included."),
    _counter("prompt_tokens_cached", "Tokens of those prompts that had been computed before."),
    _counter("generation_tokens", "Tokens generated, those of aborted answers too."),
    _counter("prefix_cache_queries", "Tokens of prompts looked up in the prefix cache."),
    _counter("prefix_cache_hits", "Tokens of those that were found there."),
    _counter("request_success", "Answers that have ended, by what ended them.", "finished_reason"),
    _histogram(
        "time_to_first_token_seconds",
        FIRST_TOKEN_BUCKETS,
        "Seconds from a request's arrival to its first token.",
    ),
    _histogram("inter_token_latency_seconds", INTER_TOKEN_BUCKETS, "Seconds between an answer's tokens."),
    _histogram(
        "request_time_per_output_token_seconds",
        INTER_TOKEN_BUCKETS,
        "Decode seconds per token after the first, of a completed answer.",
    ),
    _histogram(
        "e2e_request_latency_seconds",
        REQUEST_BUCKETS,
        "Seconds from a request's arrival to the end of its completed answer.",
    ),
    _histogram(
        "request_queue_time_seconds", REQUEST_BUCKETS, "Seconds in the engine before an answer's first step."
    ),
    _histogram(
        "request_inference_time_seconds",
        REQUEST_BUCKETS,
        "Seconds from an answer's first step to its last token.",
    ),
    _histogram(
        "request_prefill_time_seconds",
        REQUEST_BUCKETS,
        "Seconds from an answer's first step to its first token.",
    ),
    _histogram(
        "request_decode_time_seconds", REQUEST_BUCKETS, "Seconds from an answer's first token to its last."
    ),
    _histogram("request_prompt_tokens", TOKEN_BUCKETS, "Tokens of a completed answer's prompt."),
    _histogram("request_generation_tokens", TOKEN_BUCKETS, "Tokens of a completed answer."),
    # Of HTTP.
    MetricRow(
        f"{PREFIX}http_requests",
        "counter",
        "HTTP requests, by route template and status; `unmatched` for no route.",
        ("route", "status"),
    ),
    MetricRow(
        f"{PREFIX}http_request_duration_seconds",
        "histogram",
        "Seconds until the last byte of the answer to an HTTP request was sent.",
        ("route",),
        HTTP_BUCKETS,
    ),
    # Of safety.
    _counter(
        "requests",
        "Requests that got a level; asked `default` for none, `custom` for numbers.",
        "level_asked",
        "level_applied",
    ),
    _counter("level_denials", "Requests refused for their level.", "reason"),
    _counter("answers", "Completed answers, by their level.", "level_applied"),
    _counter("refusals", "Completed answers that begin like a refusal, by their level.", "level_applied"),
    _histogram("active_neurons", NEURON_BUCKETS, "Neurons of both sets that are active for a request."),
    _histogram("step_distinct_levels", STEP_LEVEL_BOUNDS, "Different thresholds in one step of the engine."),
    _histogram(
        "modulation_step_seconds",
        MODULATION_BOUNDS,
        "Seconds spent in modulation in a step, of some of the steps.",
    ),
    _gauge("mask_info", "1 for the mask in force.", "digest", "method"),
    _counter("mask_reloads", "Masks that were to be put in force.", "result"),
    # Of the server.
    _gauge("engine_ready", "1 if the engine can take requests, else 0."),
    _counter("engine_restarts", "Rebuilds of the engine after a failure, failed ones too."),
    _counter(
        "admission_rejections", "Requests that found no place or no rate, and connections refused.", "reason"
    ),
    _counter("deadlines_exceeded", "Requests that took longer than they may."),
    MetricRow(
        f"{PREFIX}audit_failures", "counter", "Lines of the audit log that could not be written.", labels=()
    ),
)

TABLE: Final[Mapping[str, MetricRow]] = MappingProxyType(
    {row.name.removeprefix(PREFIX): row for row in _ROWS}
)
"""Every metric, by its name without the prefix."""
