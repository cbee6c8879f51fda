"""The prompts of an evaluation: those of a file, and those wrapped in attacks on top.

Knows files and attack families. Knows nothing of models, answers or printing.
"""

from dataclasses import dataclass
from pathlib import Path

from modulation.errors import DataError
from modulation.evaluation.attacks import attacked, parse_families
from modulation.evaluation.data import Record
from modulation.evaluation.datasets import other_kinds, read_dataset


@dataclass(frozen=True)
class Prompts:
    """The records, in words what they are, and what to do if they are not (empty where they must be)."""

    records: list[Record]
    told: str
    hint: str

    def __str__(self) -> str:
        return "\n".join(each for each in (f"{self.told}.", self.hint) if each)


def read_prompts(data: Path, kind: str | None, attacks: str, seed: int) -> Prompts:
    """The prompts of the file `data`, and its plain harmful ones inside the families that `attacks` names.

    Raises DataError for what cannot be read, a `kind` that does not fit, and attacks that wrap nothing.
    """
    families = parse_families(attacks)
    dataset = read_dataset(data, kind)
    wrapped = attacked(dataset.records, families, seed)
    if families and not wrapped:
        raise DataError(f"--attacks {attacks}: {data} holds no plain harmful prompt to wrap.")
    what = "attack family" if len(families) == 1 else "attack families"
    inside = f"; {len(wrapped)} more inside {len(families)} {what}" if families else ""
    others = other_kinds(dataset.format) if kind is None else ()
    hint = f"If it is the other file with these columns: --kind {' or '.join(others)}." if others else ""
    return Prompts([*dataset.records, *wrapped], f"{dataset}{inside}", hint)
