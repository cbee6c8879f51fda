"""The command `neurontune prompts`: files of prompts to one file of our JSON lines, or to two that share no
source prompt.

Knows flags, files and terminals; the work is done by the modules it calls. Knows nothing of models.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Final

import typer

from modulation.errors import DataError
from modulation.evaluation.attacks import NONE, attacked, parse_families
from modulation.evaluation.data import KINDS, Record, write_records
from modulation.evaluation.options import Attacks, PromptKind
from modulation.evaluation.parting import limited, parted
from modulation.evaluation.prompts import read_prompts
from modulation.flags import refuse_unwritable

REST_SHARE: Final = 0.25


def prompts(
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE...", help="Prompts: CSV or JSON lines (docs/prompts.md).")
    ],
    kind: PromptKind = None,
    prefix: Annotated[str, typer.Option(help="Put before every id.")] = "",
    attacks: Attacks = NONE,
    keep_plain: Annotated[
        bool, typer.Option("--keep-plain/--no-keep-plain", help="Keep harmful prompts that were wrapped.")
    ] = True,
    limit: Annotated[
        int | None, typer.Option(min=1, help="At most so many source prompts of each kind, drawn by --seed.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the limit, the parts and the wrappers.")] = 0,
    out: Annotated[Path | None, typer.Option(help="File to write; left out: the lines are printed.")] = None,
    rest: Annotated[
        Path | None, typer.Option(help="Part the prompts: file for those that --out does not get.")
    ] = None,
    rest_share: Annotated[
        float | None, typer.Option(help=f"With --rest: its share of each kind; left out: {REST_SHARE}.")
    ] = None,
    rest_attacks: Annotated[
        str | None, typer.Option(help="With --rest: its families; left out: those of --attacks.")
    ] = None,
) -> None:
    """Convert, join, wrap and part files of prompts, for attribute, tune, levels and evaluate."""
    _refuse_misfits(rest, {"--rest-share": rest_share, "--rest-attacks": rest_attacks})
    refuse_unwritable(
        {"--out": out, "--rest": rest}, {f"FILE {number}": path for number, path in enumerate(files, 1)}
    )
    families = {"--attacks": attacks, "--rest-attacks": attacks if rest_attacks is None else rest_attacks}
    if not keep_plain and not any(map(parse_families, families.values())):
        raise DataError(
            "--no-keep-plain drops harmful prompts that were wrapped: name families by --attacks."
        )
    records = joined(files, kind, prefix)
    if limit is not None:
        records = limited(records, limit, seed)
    parts: list[tuple[str, Path | None, list[Record]]] = [("--attacks", out, records)]
    if rest is not None:
        kept, apart = parted(records, REST_SHARE if rest_share is None else rest_share, seed)
        parts = [("--attacks", out, kept), ("--rest-attacks", rest, apart)]
    # All are made before the first is written: an error leaves no half of a pair behind.
    made = [(path, wrapped(part, flag, families[flag], seed, keep_plain)) for flag, path, part in parts]
    for path, part in made:
        _write(path, part)


def joined(files: Sequence[Path], kind: str | None, prefix: str) -> list[Record]:
    """The records of all files; raises DataError as `read_prompts` does, and for an id of two files."""
    found: dict[str, Path] = {}
    records: list[Record] = []
    for path in files:
        read = read_prompts(path, kind, NONE, 0)
        typer.echo(f"{path}: {read}", err=True)
        for record in read.records:
            if record.id in found:
                raise DataError(
                    f"Id {record.id!r} of {path} is one of {found[record.id]} already; every id must be its "
                    "own. Convert one of the files by itself with --prefix NAME-, and join the results."
                )
            found[record.id] = path
        records += read.records
    return [_prefixed(record, prefix) for record in records]


def wrapped(records: Sequence[Record], flag: str, attacks: str, seed: int, keep_plain: bool) -> list[Record]:
    """The records, and after them the plain harmful ones inside each family that `attacks` names.

    Raises DataError for attacks that wrap nothing.
    """
    families = parse_families(attacks)
    copies = attacked(records, families, seed)
    if families and not copies:
        raise DataError(
            f"{flag} {attacks}: there is no plain harmful prompt to wrap. Add a file of them, or leave "
            f"{flag} out."
        )
    drop = bool(families) and not keep_plain
    return [each for each in records if not (drop and _is_plain_harmful(each))] + copies


def told(records: Sequence[Record]) -> str:
    """How many prompts there are of each kind, and inside which attack families."""
    families = dict.fromkeys(each.family for each in records if each.kind == "harmful" and each.family)
    num_plain = sum(map(_is_plain_harmful, records))
    num_attacked = sum(each.kind == "harmful" for each in records) - num_plain
    counts = [(num_plain, "plain harmful"), (num_attacked, f"attacked ({', '.join(map(str, families))})")]
    counts += [(sum(each.kind == kind for each in records), kind) for kind in KINDS if kind != "harmful"]
    return f"{len(records)} prompts: " + ", ".join(f"{number} {kind}" for number, kind in counts if number)


def _write(path: Path | None, records: Sequence[Record]) -> None:
    if path is None:
        typer.echo(write_records(records), nl=False)
        typer.echo(f"Printed {told(records)}.", err=True)
    else:
        path.write_text(write_records(records), encoding="utf-8")
        typer.echo(f"Wrote {path}, {told(records)}.", err=True)


def _is_plain_harmful(record: Record) -> bool:
    return record.kind == "harmful" and record.family is None


def _prefixed(record: Record, prefix: str) -> Record:
    return replace(record, id=prefix + record.id)


def _refuse_misfits(rest: Path | None, needing: dict[str, object]) -> None:
    for flag, value in needing.items():
        if rest is None and value is not None:
            raise DataError(f"{flag} {value} needs --rest, the file of the other part.")
