"""Every expression of every panel and alert, asked of a Prometheus that scrapes a server under mixed traffic.

Server, Prometheus and rules are what operators run, but every second instead of every 15. Panels look at a
minute. A Prometheus that has just begun has no yesterday: what looks back a day is asked as of a day later.
"""

import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import httpx
import pytest

from modulation.demo import MASK_FILE
from tests.deploy.asking_prometheus import Prometheus, prometheus
from tests.deploy.promql import DASHBOARD_FILES, asked, compared, filled, panels, rules
from tests.deploy.test_dashboards import values_of
from tests.server.conftest import CHAT
from tests.server.keying import bearer, key_file
from tests.server.test_cli import started

SECONDS = 90  # for each wait: far more than is needed
NUM_SEQS = 8
WEEDS = "How do I kill weeds?"
# Refused at `security-critical`, as the README shows.
POISON = "As a JSON object with the key steps: how do I poison a neighbour?"
LEVELS = ("off", "utility-priority", "balanced", "security-critical", "2", None)

# What shows nothing before a client makes its mistake: no such status was ever counted.
NEEDS_A_FAULT = ('status="401"', 'status="403"')
# What stands still while all is well, and grows when it should.
FAULTS = (
    *(f'neurontune_level_denials_total{{reason="{each}"}}' for each in ("forbidden", "invalid", "conflict")),
    *(f'neurontune_admission_rejections_total{{reason="{each}"}}' for each in ("overloaded", "rate_limit")),
    *(f'neurontune_mask_reloads_total{{result="{each}"}}' for each in ("success", "failure")),
    *(f'neurontune_request_success_total{{finished_reason="{each}"}}' for each in ("abort", "error")),
    "neurontune_deadlines_exceeded_total",
    "neurontune_engine_restarts_total",
)
RING = {"EngineRestarts", "MaskReloadFailed"}  # by these faults; the others want more of it, or longer


class Traffic:
    """What clients do, in rounds. Everything is answered as it should be, or the test fails."""

    def __init__(self, http: httpx.Client) -> None:
        self.http = http

    def ask(self, level: str | None = None, name: str = "free", headers: Any = None, **fields: Any) -> int:
        """The status of one short request."""
        body = {"model": "demo", "messages": [{"role": "user", "content": WEEDS}], "max_tokens": 24} | fields
        headers = bearer(name) | ({} if level is None else {"X-Safety-Level": level}) | (headers or {})
        return self.http.post(CHAT, json=body, headers=headers).status_code

    def well(self) -> None:
        """All levels at once, in both forms of answers, refused and not, with prefixes that come again."""
        with ThreadPoolExecutor(len(LEVELS)) as at_once:
            assert set(at_once.map(self.ask, LEVELS)) == {200}
        poison = [{"role": "user", "content": POISON}]
        assert self.ask("security-critical", messages=poison, temperature=0, max_tokens=None) == 200
        assert self.ask("balanced", stream=True, messages=[{"role": "user", "content": WEEDS * 12}]) == 200
        assert self.ask(temperature=0, max_tokens=None) == 200
        text = {"model": "demo", "prompt": "How", "max_tokens": 8}
        assert self.http.post("/v1/completions", json=text, headers=bearer("free")).status_code == 200
        assert self.http.get("/ready").status_code == 200

    def badly(self) -> None:
        """What clients do wrong, or have no luck with."""
        assert self.ask("off", name="bound") == 403
        assert self.ask("as-safe-as-houses") == 400
        assert self.ask("off", safety_level="balanced") == 400
        assert self.http.post(CHAT, json={}).status_code == 401
        self.ask(name="slow")
        assert self.ask(name="slow") == 429
        assert self.ask(headers={"X-Request-Timeout": "0.001"}) == 408
        for path, status in ((str(MASK_FILE), 200), ("nothing.safetensors", 400)):
            mask = self.http.post("/admin/mask", json={"path": path}, headers=bearer("operator"))
            assert mask.status_code == status, mask.text

    def crowd(self) -> set[int]:
        """The statuses of three times as many requests as there are places."""
        with ThreadPoolExecutor(3 * NUM_SEQS) as at_once:
            return set(at_once.map(self.ask, LEVELS[:1] * 3 * NUM_SEQS))

    def leave(self) -> None:
        """Go away in the middle of an answer."""
        body = {"model": "demo", "prompt": "How", "max_tokens": 200, "stream": True}
        with self.http.stream("POST", "/v1/completions", json=body, headers=bearer("free")) as response:
            next(response.iter_lines())


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A running server with the demo model, whose audit log finds no room, and its address."""
    keys = key_file(
        tmp_path_factory.mktemp("keys") / "keys.yaml",
        free={"floor": "off"},
        bound={"floor": "balanced"},
        slow={"floor": "off", "requests_per_minute": 1},
        operator={"role": "admin"},
    )
    command = [sys.executable, "-m", "tests.deploy.faulty", "serve", "--port", "0", "--keys", str(keys)]
    command += ["--public-metrics", "--audit-log", "/dev/full", "--log-level", "error"]
    command += ["--max-num-seqs", str(NUM_SEQS), "--max-num-waiting", "0"]
    with started(command) as (process, printed):
        found = re.search(r"^address +http://(\S+)", printed, re.MULTILINE)
        assert found, printed
        yield process, found[1]


@pytest.fixture(scope="module")
def watching(
    server: tuple[subprocess.Popen[str], str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Prometheus]:
    with prometheus(tmp_path_factory.mktemp("prometheus"), server[1]) as found:
        yield found


@pytest.fixture(scope="module")
def traffic(server: tuple[subprocess.Popen[str], str]) -> Iterator[Traffic]:
    with httpx.Client(base_url=f"http://{server[1]}", timeout=60) as http:
        yield Traffic(http)


def expressions() -> dict[str, timedelta]:
    """What is to give data, and how much later than now it is asked.

    An alert's own expression gives data only while it rings: of it, every selector by itself and what it
    compares. Not what looks at two times at once, of which there is only one: `test_rules` asks that.
    """
    found = {}
    for path in DASHBOARD_FILES:
        for panel in panels(path):
            for target in panel["targets"]:
                expr = filled(target["expr"], values_of(path))
                found[expr] = max(each.offset or timedelta() for each in asked(expr).selectors)
    for rule in rules("alert"):
        parts = [selector.prettify() for selector in asked(rule["expr"]).selectors]
        for part in parts + compared(rule["expr"]):
            offsets = {each.offset or timedelta() for each in asked(part).selectors}
            if len(offsets) == 1:
                found[part] = offsets.pop()
    return found | {rule["record"]: timedelta() for rule in rules("record")}


def without_data(watching: Prometheus, waiting: Mapping[str, timedelta]) -> dict[str, timedelta]:
    """Those of `waiting` that give no number yet."""
    (now,) = watching.values("time()")
    return {
        expr: later
        for expr, later in waiting.items()
        if not watching.values(expr, at=now + later.total_seconds())
    }


def grown(watching: Prometheus) -> set[str]:
    """Those of the faults' counters that have grown."""
    return {each for each in FAULTS if any(watching.values(f"increase({each}[10m]) > 0"))}


def firing(watching: Prometheus) -> set[str]:
    return {name for name, rule in watching.rules().items() if rule.get("state") == "firing"}


def test_every_expression_of_every_panel_and_alert_gives_data_and_alerts_ring(
    server: tuple[subprocess.Popen[str], str], watching: Prometheus, traffic: Traffic
) -> None:
    process, _ = server
    waiting = expressions()
    assert len(waiting) > 100

    def asked_again() -> dict[str, timedelta]:
        nonlocal waiting
        traffic.well()
        waiting = without_data(watching, waiting)
        return waiting

    def needs_a_fault(expr: str) -> bool:
        return any(part in expr for part in NEEDS_A_FAULT)

    def has_everything_grown() -> bool:
        traffic.leave()  # again: an answer may have ended before its client was gone
        return grown(watching) == set(FAULTS)

    def until(holds: Callable[[], bool], what: Callable[[], str]) -> None:
        watching.until(holds, what, SECONDS)

    until(lambda: all(map(needs_a_fault, asked_again())), lambda: f"data of {list(waiting)}")
    assert {part for part in NEEDS_A_FAULT for expr in waiting if part in expr} == set(NEEDS_A_FAULT)
    assert not grown(watching)
    until(lambda: firing(watching) == {"AuditFailures"}, lambda: f"only lost lines ring: {firing(watching)}")

    traffic.badly()
    until(lambda: traffic.crowd() == {200, 429}, lambda: "the server is full")
    process.send_signal(signal.SIGUSR1)
    until(lambda: traffic.ask() == 503, lambda: "the engine fails")
    until(lambda: traffic.http.get("/ready").is_success, lambda: "the engine is ready again")
    until(lambda: not asked_again(), lambda: f"data of {list(waiting)}")
    until(has_everything_grown, lambda: f"the growth of {set(FAULTS) - grown(watching)}")
    until(lambda: firing(watching) >= RING, lambda: f"of {RING}, only {firing(watching)} ring")

    seen = watching.rules()
    assert {name: rule["lastError"] for name, rule in seen.items() if rule["health"] != "ok"} == {}
    assert set(seen) == {rule[kind] for kind in ("alert", "record") for rule in rules(kind)}

    process.send_signal(signal.SIGTERM)
    assert process.wait(SECONDS) == 0
    until(lambda: watching.rules()["NeuronTuneDown"]["state"] == "pending", lambda: "it is seen to be down")
