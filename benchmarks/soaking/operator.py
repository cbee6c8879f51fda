"""The operator of a server under load: swaps masks, good ones and bad, and has the key file read again.

Knows masks, the key file and the audit log as files. Knows no client.
"""

import asyncio
import itertools
import json
import os
import signal
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from benchmarks.soaking.asked import ADMIN_MASK, ENTRIES, GUEST, ROOT, bearer, post, write_keys
from benchmarks.soaking.clients import UNAUTHENTICATED
from benchmarks.soaking.tally import LostError, Tally
from benchmarks.wire import Answer, Connection, Raw
from modulation.demo import MASK_FILE
from modulation.masks import Mask, NeuronSet

FIRST, SECOND, NONE, OTHER_MODEL, MISSING = (
    f"{name}.safetensors" for name in ("first", "second", "none", "other-model", "missing")
)
BAD: Final = (NONE, OTHER_MODEL, MISSING)
RELOAD_SECONDS: Final = 30.0
TURNS_PER_BAD_MASK: Final = 3
TURNS_PER_HANG_UP: Final = 4


@dataclass(frozen=True)
class Folder:
    """The files of one soak."""

    path: Path

    @property
    def masks(self) -> Path:
        return self.path / "masks"

    @property
    def keys(self) -> Path:
        return self.path / "keys.yaml"

    @property
    def audit(self) -> Path:
        return self.path / "audit.jsonl"

    @property
    def log(self) -> Path:
        return self.path / "server.log"

    def fill(self) -> tuple[str, str]:
        """Write keys and masks; the digests of the two good ones."""
        write_keys(self.keys, *(name for name in ENTRIES if name != GUEST))
        self.masks.mkdir()
        first = Mask.load(MASK_FILE)
        second = _second(first)
        other = first.metadata.model_copy(update={"model_fingerprint": "0" * 64})
        (self.masks / FIRST).write_bytes(MASK_FILE.read_bytes())
        second.save(self.masks / SECOND)
        replace(first, metadata=other).save(self.masks / OTHER_MODEL)
        (self.masks / NONE).write_bytes(MASK_FILE.read_bytes()[:1000])
        return first.digest, Mask.load(self.masks / SECOND).digest


def _second(first: Mask) -> Mask:
    """Another mask for the same model: weaker factors, other thresholds, and no evaluation that says so."""

    def weaker(neurons: NeuronSet) -> NeuronSet:
        return NeuronSet(neurons.neurons, np.sqrt(neurons.factors))

    levels = {"security-critical": (24, 12), "balanced": (16, 24), "utility-priority": (6, 30)}
    metadata = first.metadata.model_copy(update={"levels": levels, "evaluation": {}})
    return replace(first, safety=weaker(first.safety), utility=weaker(first.utility), metadata=metadata)


@dataclass
class Operator:
    """Acts once in `every_seconds`. `digests` are those of the first and the second mask."""

    port: int
    process: int
    folder: Folder
    digests: tuple[str, str]
    every_seconds: float
    tally: Tally = field(default_factory=Tally)

    def __post_init__(self) -> None:
        self._turns = itertools.count(1)
        self._bad = itertools.cycle(BAD)
        self._key_files = itertools.cycle((True, None, False))  # with the guest, broken, without
        self._has_guest = False
        self._num_reloads = 0

    async def work(self, seconds: float) -> None:
        """Act for so many seconds."""
        ends = asyncio.get_running_loop().time() + seconds
        while (rest := ends - asyncio.get_running_loop().time()) > self.every_seconds:
            await asyncio.sleep(min(rest, self.every_seconds))
            try:
                await self.turn(next(self._turns))
            except (LostError, OSError, EOFError, ValueError, LookupError) as error:
                self.tally.lost.append(f"operator: {error!r}")
        await asyncio.sleep(rest)

    async def turn(self, number: int) -> None:
        """Swap the mask; now and then try a bad one, or hang up."""
        await self.swap()
        if number % TURNS_PER_BAD_MASK == 0:
            await self.swap_badly(next(self._bad))
        if number % TURNS_PER_HANG_UP == 0:
            await self.hang_up(next(self._key_files))

    async def swap(self) -> None:
        """Put the mask in force that is not."""
        index = 1 - self.digests.index(await self.in_force())
        answer = await self.put((FIRST, SECOND)[index])
        self._reloaded("mask", True)
        self.tally.faults["mask swapped"] += 1
        told = answer.status, json.loads(answer.body).get("new"), await self.in_force()
        _expect("a mask", told, (200, self.digests[index], self.digests[index]))

    async def swap_badly(self, name: str) -> None:
        """Try to put a mask in force that cannot be."""
        before = await self.in_force()
        answer = await self.put(name)
        self._reloaded("mask", False)
        self.tally.faults["bad mask"] += 1
        told = answer.status, answer.code, await self.in_force()
        _expect(name, told, (400, "invalid_mask", before))

    async def hang_up(self, guest: bool | None) -> None:
        """Have the key file read again, with or without a guest, or broken (None). The mask file is read too,
        and has not changed: the mask in force stays."""
        before = await self.in_force()
        if guest is None:
            self.folder.keys.write_text("keys: [")
        else:
            write_keys(self.folder.keys, *(name for name in ENTRIES if guest or name != GUEST))
            self._has_guest = guest
        self._reloaded("keys", guest is not None)
        self.tally.faults["SIGHUP, broken key file" if guest is None else "SIGHUP"] += 1
        os.kill(self.process, signal.SIGHUP)
        async with asyncio.timeout(RELOAD_SECONDS):
            while self._num_written() < self._num_reloads:
                await asyncio.sleep(0.1)
        _expect("the mask after SIGHUP", await self.in_force(), before)
        answer = await self.ask(Raw("GET", "/v1/models", bearer(GUEST)))
        if answer.status == UNAUTHENTICATED:
            self.tally.perhaps.add(answer.head.headers["x-request-id"])
        _expect("the guest", answer.status, 200 if self._has_guest else UNAUTHENTICATED)

    async def put(self, name: str) -> Answer:
        return await self.ask(post(ADMIN_MASK, {"path": name}, ROOT))

    async def in_force(self) -> str:
        """The digest of the mask in force."""
        answer = await self.ask(Raw("GET", "/v1/safety-levels", bearer(ROOT)))
        return str(json.loads(answer.body)["mask"])

    async def ask(self, raw: Raw) -> Answer:
        connection = Connection(self.port)
        try:
            async with asyncio.timeout(RELOAD_SECONDS):
                answer = await connection.ask(raw)
        finally:
            connection.drop()
        self.tally.num_sent += 1
        self.tally.statuses[answer.status] += 1
        return answer

    def _reloaded(self, what: str, ok: bool) -> None:
        self.tally.reloads[what, ok] += 1
        self._num_reloads += 1

    def _num_written(self) -> int:
        return self.folder.audit.read_bytes().count(b'"event": "reload"')


def _expect(what: str, told: Any, expected: Any) -> None:
    if told != expected:
        raise LostError(f"{what}: {told}, not {expected}")


def records(audit: Path) -> list[dict[str, Any]]:
    """The whole lines of an audit log."""
    return [json.loads(line) for line in audit.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]


def reloads_of(lines: list[dict[str, Any]]) -> Counter[tuple[str, bool]]:
    """Lines of reloads, by what was reloaded and whether it succeeded."""
    return Counter((line["what"], line["ok"]) for line in lines if line["event"] == "reload")
