"""Answers and verdicts as JSON lines, for people to look at and for an evaluation to go on from.

Knows the file: one line an answer, written as soon as it is there, a later line of the same prompt and
level in place of an earlier one. Knows nothing of how answers or verdicts are made.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, TextIO

from modulation.errors import DataError
from modulation.evaluation.data import Record, write_records
from modulation.evaluation.judges import RULE, Verdict

FIELDS: Final = ("run", "level", "id", "kind", "family", "prompt", "answer", "judge", "verdict")


@dataclass(frozen=True)
class Answered:
    """An answer; `judge` is None before it was judged, `verdict` None where the judge gave none."""

    answer: str
    judge: str | None = None
    verdict: Verdict | None = None


def data_digest(records: Sequence[Record]) -> str:
    """What tells one set of prompts from another."""
    return hashlib.sha256(write_records(records).encode()).hexdigest()[:16]


class AnswerFile(AbstractContextManager["AnswerFile"]):
    """What was answered and judged so far, by level and record, kept in a file if there is a path.

    `run` is what answers depend on besides prompt and level; every line carries it. An existing file is
    gone on from. `with` closes the file; `finish` puts it in order first.

    Raises DataError for a file that belongs to another run, or is no such file.
    """

    def __init__(self, path: Path | None, run: Mapping[str, Any]) -> None:
        self._path: Final = path
        self._run: Final = dict(run)
        self._lines: Final[dict[tuple[str, str], dict[str, Any]]] = {}
        self._file: TextIO | None = None
        if path is not None:
            self._read(path)
            self._file = path.open("a", encoding="utf-8")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    def num_done(self, records: Sequence[Record], levels: Iterable[str], judge: str) -> int:
        """How many answers there are for the records at the levels, and verdicts of a judge model."""
        known = [self.get(level, record) for level in levels for record in records]
        there = [answered for answered in known if answered is not None]
        return len(there) + sum(judge != RULE and answered.judge == judge for answered in there)

    def get(self, level: str, record: Record) -> Answered | None:
        """What is known of a record at a level."""
        line = self._lines.get((level, record.id))
        if line is None:
            return None
        verdict = None if line["verdict"] is None else Verdict(**line["verdict"])
        return Answered(line["answer"], line["judge"], verdict)

    def known(self, level: str, record: Record) -> Answered:
        """What is known of a record that was answered at this level."""
        answered = self.get(level, record)
        assert answered is not None, (level, record.id)
        return answered

    def put(self, level: str, record: Record, answered: Answered) -> None:
        """Keep an answer, or an answer with its verdict; in the file at once."""
        fields = record.to_json()
        line = {
            "run": self._run,
            "level": level,
            **{name: fields[name] for name in ("id", "kind", "family", "prompt")},
            **asdict(answered),
        }
        self._lines[level, record.id] = line
        if self._file is not None:
            self._file.write(_written(line))
            self._file.flush()

    def finish(self, records: Sequence[Record]) -> None:
        """Write the file anew: one line an answer, by level and then in the order of the records."""
        if self._path is None:
            return
        order = {record.id: number for number, record in enumerate(records)}
        levels = list(dict.fromkeys(level for level, _ in self._lines))
        places = sorted(self._lines, key=lambda place: (levels.index(place[0]), order[place[1]]))
        whole = self._path.with_name(f"{self._path.name}.new")
        whole.write_text("".join(_written(self._lines[place]) for place in places), encoding="utf-8")
        os.replace(whole, self._path)

    def _read(self, path: Path) -> None:
        if not path.exists():
            return
        contents = path.read_bytes()
        # A last line without its end was being written when the evaluation was killed.
        whole = contents[: contents.rfind(b"\n") + 1]
        for number, line in enumerate(whole.split(b"\n")[:-1], start=1):
            fields = _fields(line, f"{path}:{number}")
            self._refuse_other_run(fields["run"], path)
            self._lines[fields["level"], fields["id"]] = fields
        if len(whole) < len(contents):
            os.truncate(path, len(whole))

    def _refuse_other_run(self, run: Mapping[str, Any], path: Path) -> None:
        for name in {**self._run, **run}:
            if run.get(name) != self._run.get(name):
                raise DataError(
                    f"--answers-out {path} holds the answers of another evaluation: {name} was "
                    f"{run.get(name)!r} and is {self._run.get(name)!r} now. Name another file, or delete "
                    "this one."
                )


def _written(line: Mapping[str, Any]) -> str:
    return json.dumps(line, ensure_ascii=False) + "\n"


def _fields(line: bytes, place: str) -> dict[str, Any]:
    try:
        fields = json.loads(line)
    except ValueError:
        fields = None
    if not isinstance(fields, dict) or tuple(fields) != FIELDS or not isinstance(fields["run"], dict):
        raise DataError(
            f"{place}: is no line that --answers-out wrote: those have the fields {', '.join(FIELDS)}. "
            "Name another file."
        )
    return fields
