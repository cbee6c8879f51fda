"""A real Prometheus with the configuration that we ship, in front of one server, but every second."""

import math
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml

from tests.deploy.promql import PROMETHEUS, RULE_FILES
from tests.deploy.tools import tool

POLL_SECONDS = 0.2


@dataclass
class Prometheus:
    """Its HTTP API."""

    http: httpx.Client

    def values(self, expr: str, at: float | None = None) -> list[float]:
        """What an expression gives now, or at that time: the numbers among it."""
        asked = {"query": expr} | ({} if at is None else {"time": str(at)})
        answer = self.http.post("/api/v1/query", data=asked).json()
        assert answer["status"] == "success", (expr, answer)
        found = answer["data"]["result"]
        samples = [found] if answer["data"]["resultType"] == "scalar" else [each["value"] for each in found]
        return [value for _, text in samples if not math.isnan(value := float(text))]

    def rules(self) -> dict[str, dict[str, Any]]:
        """Every rule, by its name, as Prometheus sees it."""
        groups = self.http.get("/api/v1/rules").json()["data"]["groups"]
        return {rule["name"]: rule for group in groups for rule in group["rules"]}

    def until(self, holds: Callable[[], bool], what: Callable[[], str], seconds: float) -> None:
        """Wait until something holds, for so long at most; then say what did not."""
        deadline = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < deadline, f"not within {seconds} s: {what()}"
            time.sleep(POLL_SECONDS)


@contextmanager
def prometheus(folder: Path, target: str) -> Iterator[Prometheus]:
    """A Prometheus that scrapes `target`, and keeps what it needs in `folder`."""
    program = tool("prometheus")
    own = f"127.0.0.1:{_free_port()}"
    (folder / "rules").mkdir(parents=True)
    (folder / "prometheus.yml").write_text(yaml.safe_dump(_every_second(target, own)))
    for path in RULE_FILES:
        content = yaml.safe_load(path.read_text())
        for group in content["groups"]:
            group.pop("interval", None)
        (folder / "rules" / path.name).write_text(yaml.safe_dump(content))
    command = [
        program,
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'data'}",
    ]
    command += [f"--web.listen-address={own}", "--log.level=warn"]
    for kind in ("templates", "libraries"):
        command.append(f"--web.console.{kind}={folder}")
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"GOMAXPROCS": "1"})
        try:
            with httpx.Client(base_url=f"http://{own}", timeout=30) as http:
                found = Prometheus(http)
                found.until(lambda: _is_ready(http, process), lambda: "Prometheus is ready", 60)
                yield found
        finally:
            process.terminate()
            process.wait(30)
            shutil.rmtree(folder / "data", ignore_errors=True)


def _every_second(target: str, own: str) -> dict[str, Any]:
    """The shipped configuration, with these targets; nobody is there to be told of alerts."""
    config = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
    config["global"] = dict.fromkeys(config["global"], "1s")
    del config["alerting"]
    jobs = {job["job_name"]: job for job in config["scrape_configs"] if job["job_name"] != "alertmanager"}
    for name, place in (("neurontune", target), ("prometheus", own)):
        jobs[name]["static_configs"][0]["targets"] = [place]
    config["scrape_configs"] = list(jobs.values())
    assert isinstance(config, dict)
    return config


def _is_ready(http: httpx.Client, process: subprocess.Popen[bytes]) -> bool:
    assert process.poll() is None, "Prometheus has ended"
    try:
        return http.get("/-/ready").status_code == 200
    except httpx.TransportError:
        return False


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
