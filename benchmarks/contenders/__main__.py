"""This server beside what would be used instead: every contender a real server on loopback, in one run.

All have the same weights, dtype, cores and kinds of prompts. Those that are compared are up together and are
asked in turns, in rounds of shuffled order, so that drift of the machine touches them alike; since two
processes of the same code differ by some percent, everything is started anew `--starts` times. No prompt is
asked twice. Tokens are counted from the answers' text, with one tokenizer for all. A round ends with its
longest answer, so those should be of one length: the limit is one that nearly all of the demo model's reach.
Printed: a table for each load, ratios of tokens per second with their quartiles over all rounds, and of the
time to the first text; the last line is JSON.

    python -m benchmarks.contenders                                    two loads, without vLLM
    python -m benchmarks.contenders --full --vllm .venv-vllm/bin/python
"""

import argparse
import asyncio
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from benchmarks.contenders.load import Asker, Load, Measured
from benchmarks.contenders.sides import (
    MODEL,
    Setting,
    Side,
    Started,
    contenders,
    heats,
    ratios,
    sides,
    started,
)
from benchmarks.serving import ending_with_sigterm
from benchmarks.shapes import SHAPES, random_mask, speaking, write
from modulation.demo import MASK_FILE, MODEL_DIR
from modulation.masks import Mask

BRIEF = (Load(1, 6), Load(16, 2))
FULL = (
    *(Load(concurrency, per_client) for concurrency, per_client in ((1, 6), (4, 3), (16, 2), (32, 2))),
    *(Load(16, 1, prompts) for prompts in ("long", "shared")),
    Load(1, 24, rate=12.0),
)


def main() -> None:
    arguments = _arguments()
    with tempfile.TemporaryDirectory() as folder, ending_with_sigterm():
        setting = _setting(arguments, Path(folder))
        found = sides(setting)
        chosen = {name: found[name] for name in _named("--only", arguments.only, ",", found)}
        tokenizer = AutoTokenizer.from_pretrained(setting.model)
        run = _Run(setting, chosen, Asker(tokenizer, arguments.max_tokens), arguments)
        try:
            for number in range(arguments.starts):
                run.start(number)
        finally:
            run.report()  # what there is, also where a server has failed


Rounds = dict[tuple[str, int, int], Measured]
"""Of one side at one load, by heat, start and turn."""


class _Run:
    def __init__(
        self, setting: Setting, chosen: dict[str, Side], asker: Asker, arguments: argparse.Namespace
    ) -> None:
        self._setting = setting
        self._sides = chosen
        self._asker = asker
        self._arguments = arguments
        self._loads = _loads(arguments)
        self._source = random.Random(arguments.seed)
        self._rounds: dict[str, dict[str, Rounds]] = {
            load.name: {name: {} for name in chosen} for load in self._loads
        }
        self._pairs = ratios(setting)
        self._start_seconds: dict[str, list[float]] = {}
        self._memory: dict[str, list[float]] = {}

    def start(self, number: int) -> None:
        """Heat by heat: start its contenders, ask them, end them."""
        for heat, names in heats(self._setting).items():
            chosen = {name: self._sides[name] for name in names if name in self._sides}
            if not any(ours in chosen and theirs in chosen for ours, theirs in self._pairs.values()):
                continue
            with ExitStack() as stack:
                running = {
                    name: self._started(name, f"{heat}-{number}", stack)
                    for name in dict.fromkeys(side.contender for side in chosen.values())
                }
                asyncio.run(self._ask_all((heat, number), chosen, running))
                for name, each in running.items():
                    self._memory.setdefault(name, []).append(each.memory_mb())

    def _started(self, name: str, run: str, stack: ExitStack) -> Started:
        log = stack.enter_context((self._arguments.logs / f"{name}-{run}.log").open("wb"))
        found = stack.enter_context(started(name, contenders(self._setting)[name], log))
        self._start_seconds.setdefault(name, []).append(found.seconds)
        _say(f"{name}: ready in {found.seconds:.1f} s")
        return found

    async def _ask_all(
        self, run: tuple[str, int], chosen: dict[str, Side], running: dict[str, Started]
    ) -> None:
        for load in self._loads:
            for turn in range(-self._arguments.warmup, self._arguments.rounds):
                for name in self._source.sample(list(chosen), len(chosen)):
                    side = chosen[name]
                    target = partial(side.target, running[side.contender].ports)
                    # The same times of arrival for all sides of a turn.
                    source = random.Random(f"{self._arguments.seed} {run} {turn}")
                    with running[side.contender].alone(running.values()):
                        measured = await self._asker.round(load, turn, target, source)
                    if turn >= 0:
                        self._rounds[load.name][name][*run, turn] = measured
            _say(f"{run[0]}: {load.name}")

    def report(self) -> None:
        """The tables, the ratios, and all of it as JSON."""
        found: dict[str, Any] = {"loads": {}, "ratios": {}}
        for load, rounds in self._rounds.items():
            _say(f"\n{load:<32} {'tokens/s':>8} {'length':>6}   first text, ms{'between texts, ms':>25}")
            _say(f"{'':<48}" + f"{'p50':>8}{'p95':>8}{'p99':>8}   " * 2)
            found["loads"][load] = {
                name: _medians(list(each.values())) for name, each in rounds.items() if each
            }
            for name, row in found["loads"][load].items():
                cells = "".join(f"{row[key]:8.1f}" for key in list(row)[2:5])
                gaps = "".join(f"{row[key]:8.2f}" for key in list(row)[5:])
                sizes = f"{row['tokens_per_second']:8.1f} {row['answer_tokens']:6.1f}"
                _say(f"  {name:<30} {sizes}{cells}   {gaps}")
            found["ratios"][load] = self._ratios(rounds)
            for name, ratio in found["ratios"][load].items():
                _say(
                    f"  {name:<36} {ratio['median']:6.3f} ({ratio['low']:.3f} to {ratio['high']:.3f}),"
                    f" first text {ratio['first_text']:.3f}"
                )
        found["start_seconds"] = {name: round(min(each), 2) for name, each in self._start_seconds.items()}
        found["memory_mb"] = {name: round(max(each), 1) for name, each in self._memory.items()}
        _say(f"\nseconds to ready  {found['start_seconds']}\nMB resident       {found['memory_mb']}")
        setting = {
            "hardware": _hardware(self._setting.device),
            "versions": {name: version(name) for name in ("torch", "transformers")},
            "model": self._arguments.shape or os.path.relpath(self._setting.model),
            "seed": self._arguments.seed,
            "starts": self._arguments.starts,
            "rounds": self._arguments.rounds,
            "command": "python -m benchmarks.contenders " + " ".join(sys.argv[1:]),
        }
        _say("\n".join(f"{name:<10} {value}" for name, value in setting.items()))
        _say(json.dumps({**setting, **found}))

    def _ratios(self, rounds: dict[str, Rounds]) -> dict[str, dict[str, float]]:
        found = {}
        for name, (ours, theirs) in self._pairs.items():
            shared = rounds.get(ours, {}).keys() & rounds.get(theirs, {}).keys()
            if len(shared) > 1:
                pairs = [(rounds[ours][turn], rounds[theirs][turn]) for turn in shared]
                speeds = [a.tokens_per_second / b.tokens_per_second for a, b in pairs]
                low, median, high = statistics.quantiles(speeds, n=4, method="inclusive")
                firsts = statistics.median(a.first_ms[50] / b.first_ms[50] for a, b in pairs)
                found[name] = {
                    "median": round(median, 4), "low": round(low, 4), "high": round(high, 4),
                    "first_text": round(firsts, 4),
                }  # fmt: skip
        return found


def _medians(rounds: list[Measured]) -> dict[str, float]:
    row = {
        name: statistics.median(getattr(each, name) for each in rounds)
        for name in ("tokens_per_second", "answer_tokens")
    }
    for kind in ("first_ms", "gap_ms"):
        for percent in (50, 95, 99):
            row[f"{kind}_p{percent}"] = statistics.median(getattr(each, kind)[percent] for each in rounds)
    return {name: round(value, 3) for name, value in row.items()}


def _setting(arguments: argparse.Namespace, folder: Path) -> Setting:
    if arguments.shape:
        model = speaking(arguments.shape, arguments.seed)
        arguments.model = folder / "model"
        arguments.mask = write(model, random_mask(model, arguments.seed), arguments.model)
    mask = Mask.load(arguments.mask)
    setting = Setting(
        str(arguments.model),
        arguments.mask,
        mask.levels,
        arguments.max_num_seqs,
        arguments.vllm,
        device=arguments.device,
    )
    if not arguments.vllm:
        return setting
    adapters = folder / "adapters"
    subprocess.run(
        [
            *(sys.executable, "-m", "server", "export", "lora", "--model", setting.model),
            *("--mask", str(setting.mask), "--name", MODEL, "--out", str(adapters)),
        ],
        check=True,
    )
    return Setting(**{**setting.__dict__, "adapters": adapters})


def _loads(arguments: argparse.Namespace) -> Sequence[Load]:
    """Raises SystemExit for a part that no load has in its name."""
    if not arguments.loads:
        return FULL if arguments.full else BRIEF
    names = _named("--loads", arguments.loads, ";", [load.name for load in FULL])
    return [load for load in FULL if load.name in names]


def _named(flag: str, given: str, separator: str, names: Collection[str]) -> list[str]:
    """Those of `names` that hold a part of what the flag gives, all where it gives nothing. Raises SystemExit
    for a part that none of them holds."""
    parts = [part.strip() for part in given.split(separator)] if given else []
    for part in parts:
        if not part or not any(part in name for name in names):
            raise SystemExit(f"{flag}: {part!r} is part of no name. There are {'; '.join(names)}.")
    return [name for name in names if not parts or any(part in name for part in parts)]


def _hardware(device: str) -> str:
    processor = f"{platform.machine()}, {os.cpu_count()} cores"
    return processor if device == "cpu" else f"{torch.cuda.get_device_name()}, {processor}"


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _arguments() -> Any:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL_DIR, help="a Hugging Face folder")
    parser.add_argument("--mask", type=Path, default=MASK_FILE, help="its mask file")
    parser.add_argument("--shape", choices=SHAPES, help="random weights instead, with the demo's vocabulary")
    parser.add_argument(
        "--vllm", metavar="PYTHON", help="of an environment with vLLM, such as make vllm-env's"
    )
    parser.add_argument(
        "--full", action="store_true", help="1, 4, 16 and 32 at once, long prompts, Poisson arrivals"
    )
    parser.add_argument("--only", default="", help="parts of the sides' names, separated by commas")
    parser.add_argument("--loads", default="", help="parts of the loads' names, separated by semicolons")
    parser.add_argument("--starts", type=int, default=2, help="how often everything is started anew")
    parser.add_argument("--rounds", type=int, default=6, help="counted rounds of each side, load and start")
    parser.add_argument("--warmup", type=int, default=1, help="rounds not counted, before those")
    parser.add_argument("--max-tokens", type=int, default=28, help="of an answer, at most")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: in bfloat16")
    parser.add_argument("--max-num-seqs", type=int, default=64, help="requests that run at once, at most")
    parser.add_argument("--seed", type=int, default=0, help="of the order of sides and of arrivals")
    parser.add_argument(
        "--logs", type=Path, default=Path(tempfile.gettempdir()), help="a folder for servers' logs"
    )
    arguments = parser.parse_args()
    if arguments.shape and (arguments.model, arguments.mask) != (MODEL_DIR, MASK_FILE):
        parser.error("--shape: comes with a model and a mask of its own; leave --model and --mask out")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here")
    _loads(arguments)
    if arguments.starts < 2:
        parser.error("--starts: at least 2 are needed, since two processes of the same code differ")
    return arguments


if __name__ == "__main__":
    main()
