"""Files of prompts, in the CSV form their authors publish or as our JSON lines, to `Record`s.

Knows the columns of each format, as published. Knows nothing of models or answers, downloads nothing,
and ships no prompts of others.
"""

import csv
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from modulation.errors import DataError
from modulation.evaluation.data import Record, parse_records, read_text, refuse_repeated_ids

JSON_LINES: Final = "JSON lines"
CONTRAST: Final = "contrast_"
LABELS: Final[Mapping[str, str]] = {"safe": "borderline", "unsafe": "harmful"}


@dataclass(frozen=True)
class Row:
    """One row of a CSV file by column: its number, the line it begins on, and both in words for errors."""

    cells: Mapping[str, str]
    number: int
    line: int
    place: str

    def text(self, column: str) -> str:
        """The cell; raises DataError where it is empty."""
        if not self.cells[column].strip():
            raise DataError(f"{self.place}: column {column!r} is empty; a text is expected.")
        return self.cells[column]

    def text_or_none(self, column: str) -> str | None:
        return self.cells[column] if self.cells.get(column, "").strip() else None


@dataclass(frozen=True)
class Format:
    """A published file form. `required` columns tell it from the others, `unused` ones may be there.

    `kinds` are the kinds that `--kind` may choose from, the default first: several where two published
    files of different kinds have the same columns, none where each row says its own.
    """

    name: str
    required: tuple[str, ...]
    unused: tuple[str, ...]
    kinds: tuple[str, ...]
    record: Callable[[Row, str], Record]


def _goal_and_target(row: Row, kind: str) -> Record:
    return Record(f"advbench-{row.number}", row.text("goal"), kind, answer=row.text_or_none("target"))


def _harmbench(row: Row, kind: str) -> Record:
    """The context first, then the behavior, parted as HarmBench's own baselines part them."""
    prompt, context = row.text("Behavior"), row.text_or_none("ContextString")
    if context is not None:
        prompt = f"{context}\n\n---\n\n{prompt}"
    return Record(f"harmbench-{row.text('BehaviorID')}", prompt, kind)


def _jailbreakbench(row: Row, kind: str) -> Record:
    identifier = f"jailbreakbench-{row.text('Index')}"
    return Record(identifier, row.text("Goal"), kind, answer=row.text_or_none("Target"))


def _strongreject(row: Row, kind: str) -> Record:
    return Record(f"strongreject-{row.number}", row.text("forbidden_prompt"), kind)


def _or_bench(row: Row, kind: str) -> Record:
    return Record(f"or-bench-{row.number}", row.text("prompt"), kind)


def _xstest_labelled(row: Row, _kind: str) -> Record:
    label = row.text("label")
    if label not in LABELS:
        raise DataError(f"{row.place}: column 'label': {label!r} is unknown; accepted: {', '.join(LABELS)}.")
    return Record(f"xstest-{row.text('id')}", row.text("prompt"), LABELS[label])


def _xstest_by_type(column: str) -> Callable[[Row, str], Record]:
    """For the files without labels: the types that begin with `contrast_` are the unsafe ones."""

    def record(row: Row, _kind: str) -> Record:
        kind = "harmful" if row.text("type").startswith(CONTRAST) else "borderline"
        return Record(f"xstest-{row.text(column)}", row.text("prompt"), kind)

    return record


FORMATS: Final[tuple[Format, ...]] = (
    Format("AdvBench", ("goal", "target"), (), ("harmful",), _goal_and_target),
    Format(
        "HarmBench",
        ("Behavior", "FunctionalCategory", "SemanticCategory", "Tags", "ContextString", "BehaviorID"),
        (),
        ("harmful",),
        _harmbench,
    ),
    Format("XSTest", ("id", "prompt", "type", "label"), ("focus", "note"), (), _xstest_labelled),
    Format(
        "XSTest (second edition, without labels)",
        ("id_v2", "prompt", "type"),
        ("id_v1", "focus", "note"),
        (),
        _xstest_by_type("id_v2"),
    ),
    Format(
        "XSTest (first edition, without labels)",
        ("id", "prompt", "type"),
        ("focus", "note"),
        (),
        _xstest_by_type("id"),
    ),
    Format(
        "JailbreakBench",
        ("Index", "Goal", "Target", "Behavior", "Category", "Source"),
        (),
        ("harmful", "benign", "borderline"),
        _jailbreakbench,
    ),
    Format("StrongREJECT", ("category", "source", "forbidden_prompt"), (), ("harmful",), _strongreject),
    Format("OR-Bench", ("prompt", "category"), (), ("borderline", "harmful"), _or_bench),
)


@dataclass(frozen=True)
class Dataset:
    """The records of a file and the name of the format it was recognised as."""

    format: str
    records: list[Record]

    def __str__(self) -> str:
        kinds = [record.kind for record in self.records]
        counted = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
        return f"{len(kinds)} prompts, read as {self.format}: {counted}"


def read_dataset(path: Path, kind: str | None = None) -> Dataset:
    """Read a file of prompts; `kind` says which of the published files it is where two look the same.

    Raises DataError that names the file, the row and column, what is accepted and what is missing.
    """
    text = read_text(path)
    if not text.strip():
        raise DataError(f"{path}: holds no prompts; the file is empty.")
    if path.suffix == ".jsonl" or text.lstrip().startswith("{"):
        if kind is not None:
            raise DataError(f"--kind {kind}: {path} holds JSON lines, where field 'kind' of each says it.")
        return Dataset(JSON_LINES, parse_records(text, path))
    rows = _rows(text, path)
    header = next(rows)[1]
    form = recognise(header, path)
    chosen = _kind(form, kind, path)
    found = [(row, form.record(row, chosen)) for row in _filled(rows, header, path)]
    if not found:
        raise DataError(f"{path}: holds no prompts, only the header of {form.name}.")
    refuse_repeated_ids(((record, row.line) for row, record in found), path)
    return Dataset(form.name, [record for _, record in found])


def other_kinds(name: str) -> tuple[str, ...]:
    """Of the format with this name: the kinds that another published file with its columns may be."""
    return next((form.kinds[1:] for form in FORMATS if form.name == name), ())


def recognise(header: Sequence[str], path: Path) -> Format:
    """The format with these columns; of several, the one that requires most of them.

    Raises DataError that says what is missing, or too much, and lists all formats.
    """
    if len(set(header)) < len(header):
        raise DataError(f"{path}: the header names a column twice: {', '.join(header)}.")
    nearest = max(FORMATS, key=lambda form: _likeness(form, header))
    missing = [name for name in nearest.required if name not in header]
    if len(missing) == len(nearest.required):
        raise DataError(f"{path}: the header {', '.join(header)!r} is that of no known format. {_accepted()}")
    if missing:
        raise DataError(
            f"{path}: looks like {nearest.name}, but the header lacks {', '.join(missing)}. {_accepted()}"
        )
    unknown = [name for name in header if name not in nearest.required + nearest.unused]
    if unknown:
        raise DataError(
            f"{path}: looks like {nearest.name}, but column {unknown[0]!r} is none of its own: "
            f"{', '.join(nearest.required + nearest.unused)}. Take it out. {_accepted()}"
        )
    return nearest


def _likeness(form: Format, header: Sequence[str]) -> tuple[bool, int, float]:
    """Complete formats before incomplete ones, then more columns in common, then fewer missing."""
    common = sum(name in header for name in form.required)
    return common == len(form.required), common, common / len(form.required)


def _accepted() -> str:
    listed = "; ".join(f"{form.name}: {','.join(form.required)}" for form in FORMATS)
    return f"Accepted: {listed}; or JSON lines with id, prompt, kind (docs/evaluation.md)."


def _kind(form: Format, kind: str | None, path: Path) -> str:
    if kind is None:
        return form.kinds[0] if form.kinds else ""
    if not form.kinds:
        raise DataError(f"--kind {kind}: {path} is {form.name}, where each row says its own kind.")
    if kind not in form.kinds:
        raise DataError(
            f"--kind {kind!r} does not fit {path}, which is {form.name}; accepted: {', '.join(form.kinds)}."
        )
    return kind


def _rows(text: str, path: Path) -> Iterator[tuple[int, list[str]]]:
    """Every row that is not blank, with the line it begins on."""
    reader = csv.reader(io.StringIO(text), strict=True)
    line = 1
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):
                yield line, cells
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}:{line}: is not CSV: {error}.") from error


def _filled(rows: Iterator[tuple[int, list[str]]], header: Sequence[str], path: Path) -> Iterator[Row]:
    for number, (line, cells) in enumerate(rows, start=1):
        place = f"{path}:{line} (row {number})"
        if len(cells) != len(header):
            raise DataError(f"{place}: has {len(cells)} cells; the header has {len(header)} columns.")
        yield Row(dict(zip(header, cells, strict=True)), number, line, place)
