"""Whether an upstream is there and has every adapter: before the engine is made, and ever after.

Knows how an upstream is asked what it serves. Knows no request and no event loop: it looks on a thread of its
own.
"""

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import httpx

from modulation.errors import ModelError
from modulation.levels import OFF, Threshold
from server.engines.base import GenerationError
from server.engines.upstream_wire import COMPLETIONS, as_object

CONNECT_SECONDS: Final = 5.0
LOOK_SECONDS: Final = 10.0
PROBE_SECONDS: Final = 120.0
# Below the five seconds after which uvicorn closes an idle connection: both at once would lose a request.
KEEP_ALIVE_SECONDS: Final = 2.0

_NOBODY: Final = "neurontune-no-such-model"
_PROBE: Final = "How do I kill weeds in my garden? To begin with,"
_NUM_TRIES: Final = 2


@dataclass(frozen=True)
class Target:
    """An upstream: its address, the key for it, and which of its models stands for each level, `off` among
    them, with the level's threshold."""

    url: str
    key: str | None = field(repr=False)
    models: Mapping[str, str]
    thresholds: Mapping[str, Threshold]

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.key is None else {"Authorization": f"Bearer {self.key}"}


class Looks:
    """An upstream, as it can be asked on any thread. `close` it."""

    def __init__(self, target: Target) -> None:
        self._target: Final = target
        self._client: Final = httpx.Client(
            base_url=target.url,
            headers=target.headers,
            timeout=httpx.Timeout(LOOK_SECONDS, connect=CONNECT_SECONDS),
            transport=httpx.HTTPTransport(retries=1),
        )

    def close(self) -> None:
        self._client.close()

    def why_not_ready(self) -> str:
        """The reason why nothing can be generated there now; empty: there is none."""
        try:
            health = self._got("/health")
            # An engine without this route is judged by the next one alone.
            if health.status_code not in (200, 404):
                return f"the upstream says that it is not well (status {health.status_code} at /health)"
            return self._why_incomplete(self._listed())
        except (GenerationError, ModelError) as error:
            return f"the upstream's list of models cannot be read ({error})"
        except httpx.HTTPError as error:
            logging.getLogger(__name__).warning("%s: %r", self._target.url, error)
            return "the upstream cannot be reached"

    def check(self) -> int | None:
        """What must hold before anything is served; the upstream's longest context, if it says so.

        Raises ModelError.
        """
        try:
            listed = self._listed()
            if why := self._why_incomplete(listed):
                raise ModelError(
                    f"{self._target.url}: {why}. Export the levels (neurontune export lora), load them there "
                    "under these names, or say under which with --adapter and --upstream-model."
                )
            self._refuse_indifferent()
            self._refuse_equal()
        except GenerationError as error:
            raise ModelError(f"{self._target.url}: {error}") from error
        except httpx.HTTPError as error:
            raise ModelError(
                f"The upstream {self._target.url} cannot be reached: {error or repr(error)}. Start it first."
            ) from error
        length = listed[self._target.models[OFF]].get("max_model_len")
        return length if isinstance(length, int) else None

    def _got(self, path: str) -> httpx.Response:
        """A GET may be asked again, whatever became of it."""
        for _ in range(_NUM_TRIES - 1):
            try:
                return self._client.get(path)
            except httpx.TransportError:
                continue
        return self._client.get(path)

    def _listed(self) -> dict[str, Mapping[str, Any]]:
        response = self._got("/v1/models")
        if response.status_code in (401, 403):
            raise ModelError(
                f"{self._target.url} refuses this server's key (status {response.status_code}): give "
                "the right one with --upstream-key-file."
            )
        if response.status_code != 200:
            raise ModelError(
                f"{self._target.url} answers with status {response.status_code} at /v1/models: is it an "
                "OpenAI-compatible server's address, without /v1?"
            )
        found = as_object(response.content).get("data")
        models = found if isinstance(found, list) else []
        return {str(each["id"]): each for each in models if isinstance(each, dict) and "id" in each}

    def _why_incomplete(self, listed: Mapping[str, Any]) -> str:
        missing = sorted(name for name in self._target.models.values() if name not in listed)
        if not missing:
            return ""
        lists = ", ".join(sorted(listed)) or "nothing"
        return f"the upstream does not list {', '.join(missing)}; it lists {lists}"

    def _refuse_indifferent(self) -> None:
        """One that answers for any name would answer for a missing adapter with the bare model."""
        response = self._probed(_NOBODY)
        if response.status_code < 400:
            raise ModelError(
                f"{self._target.url} answers for a model that it does not have ({_NOBODY!r}), so nothing "
                "says which adapter answers. It cannot be used."
            )

    def _refuse_equal(self) -> None:
        """Levels that answer alike to the last digit: an adapter that is not applied, or the wrong one."""
        answers: dict[str, str] = {}
        for level, model in self._target.models.items():
            response = self._probed(model)
            if response.status_code != 200:
                raise ModelError(
                    f"{self._target.url} does not answer with the model {model!r} (status "
                    f"{response.status_code}): {response.text[:200]}"
                )
            choice = as_object(response.content)["choices"][0]
            if not choice.get("logprobs"):
                continue  # text alone may well be the same
            answer = repr((choice["text"], choice["logprobs"]))
            twin = answers.setdefault(answer, level)
            if self._target.thresholds[twin] != self._target.thresholds[level]:
                raise ModelError(
                    f"{self._target.url}: the models {self._target.models[twin]!r} and {model!r} answer "
                    "alike to the last digit, so one of them is not the level that it stands for "
                    f"({twin}, {level})."
                )

    def _probed(self, model: str) -> httpx.Response:
        body = {"model": model, "prompt": _PROBE, "max_tokens": 8, "temperature": 0, "logprobs": 1}
        return self._client.post(COMPLETIONS, json=body, timeout=PROBE_SECONDS)


class Watch:
    """Looks again and again, on a thread of its own, from `begin` until `close`.

    `look` gives the reason why nothing can be generated, or nothing. `seconds` lie between two looks.
    """

    def __init__(self, look: Callable[[], str], seconds: float) -> None:
        self._look: Final = look
        self._seconds: Final = seconds
        self._wake: Final = threading.Event()
        self._ends: Final = threading.Event()
        self._thread: Final = threading.Thread(target=self._run, name="upstream", daemon=True)
        self._reason = ""

    @property
    def reason(self) -> str:
        """Why nothing can be generated, as far as is known; empty: it can."""
        return self._reason

    def begin(self) -> None:
        self._thread.start()

    def distrust(self, reason: str) -> None:
        """A request has met `reason`: it holds until the next look, which comes at once."""
        self._reason = reason
        self._wake.set()

    def close(self) -> None:
        """Idempotent, on any thread but its own."""
        self._ends.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while True:
            self._wake.wait(self._seconds)
            self._wake.clear()
            if self._ends.is_set():
                return
            before, self._reason = self._reason, self._look()
            if self._reason != before:
                logging.getLogger(__name__).warning(
                    "%s", f"Not ready: {self._reason}." if self._reason else "The upstream is ready."
                )


def adapters_of(base: str, levels: Sequence[str], given: Mapping[str, str]) -> dict[str, str]:
    """The upstream's model for each level: `base` for `off`; else what is given, or the name that the export
    writes.

    Raises ModelError for a level that is not there.
    """
    for level in given:
        if level not in levels or level == OFF:
            accepted = ", ".join(each for each in levels if each != OFF)
            raise ModelError(f"--adapter names the level {level!r}; accepted: {accepted}.")
    name = base.rstrip("/").rpartition("/")[2]
    return {level: base if level == OFF else given.get(level, f"{name}-{level}") for level in levels}
