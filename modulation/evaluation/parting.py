"""Records in two parts that share no source prompt, and fewer of them.

Knows records, their ids and texts. Knows nothing of files, models or attack texts.

Records have one source where their ids are the same but for the attack family in them, or where their
prompts are the same but for capitals and white space. Who belongs to which part follows from the source's
id and the seed alone, so the same records are always parted alike.
"""

import hashlib
from collections.abc import Sequence

from modulation.errors import DataError
from modulation.evaluation.data import KINDS, Record

_FEWEST = 2


def source_of(record: Record) -> str:
    """The id without its family: `ID+FAMILY` as `attacked` writes it, or `...-FAMILY-...` as
    `neurontune demo data` does, which says `none` where there is no family."""
    family = record.family or "none"
    return record.id.removesuffix(f"+{family}").replace(f"-{family}-", "-", 1)


def by_source(records: Sequence[Record]) -> list[list[Record]]:
    """The records of each source together, in the order in which they first appear."""
    parents: dict[str, str] = {}

    def root(name: str) -> str:
        while parents.setdefault(name, name) != name:
            name = parents[name]
        return name

    for record in records:
        parents[root(f"text {_text(record)}")] = root(f"id {source_of(record)}")
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(root(f"id {source_of(record)}"), []).append(record)
    return list(groups.values())


def limited(records: Sequence[Record], limit: int, seed: int) -> list[Record]:
    """At most `limit` sources of each kind, drawn by `seed`, with all their records, in the order given."""
    kept = [group for kind in KINDS for group in _drawn(records, kind, seed)[:limit]]
    return _of(records, kept)


def parted(records: Sequence[Record], share: float, seed: int) -> tuple[list[Record], list[Record]]:
    """The records but for `share` of the sources of each kind, and the records of those; in the order given.

    Each part has at least one source of every kind. Raises DataError for a share that is no part of the
    whole, and for a kind that has a single source.
    """
    if not 0 < share < 1:
        raise DataError(f"--rest-share {share:g}: a number above 0 and below 1 is expected, such as 0.25.")
    apart: list[list[Record]] = []
    for kind in KINDS:
        groups = _drawn(records, kind, seed)
        if groups:
            apart += groups[: _num_apart(kind, len(groups), share)]
    rest = _of(records, apart)
    ids = {record.id for record in rest}
    return [record for record in records if record.id not in ids], rest


def _num_apart(kind: str, num_sources: int, share: float) -> int:
    if num_sources < _FEWEST:
        raise DataError(
            f"There is {num_sources} {kind} prompt: parting needs at least {_FEWEST} of a kind, one for "
            "each part (prompts that differ in their attack only are one). Add some, or leave --rest out."
        )
    return min(num_sources - 1, max(1, round(share * num_sources)))


def _drawn(records: Sequence[Record], kind: str, seed: int) -> list[list[Record]]:
    """The sources whose first record is of this kind, in an order that follows from seed and id."""
    groups = [group for group in by_source(records) if group[0].kind == kind]
    return sorted(groups, key=lambda group: _digest(f"{seed}/{source_of(group[0])}"))


def _of(records: Sequence[Record], groups: Sequence[Sequence[Record]]) -> list[Record]:
    ids = {record.id for group in groups for record in group}
    return [record for record in records if record.id in ids]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _text(record: Record) -> str:
    return " ".join(record.prompt.casefold().split())
