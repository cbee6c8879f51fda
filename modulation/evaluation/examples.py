"""Which prompts a report shows with their answers.

Knows records. Never looks at answers: what is shown is not picked to please.
"""

from collections.abc import Sequence
from itertools import chain, zip_longest

from modulation.evaluation.data import Record

MAX_EXAMPLES = 8


def example_records(records: Sequence[Record], limit: int = MAX_EXAMPLES) -> list[Record]:
    """Up to `limit` records: attacked, plain harmful, borderline and benign ones in turn, each of these
    taken from all over its part of the file; in the file's order within each."""
    groups = [
        [r for r in records if r.kind == "harmful" and r.family is not None],
        [r for r in records if r.kind == "harmful" and r.family is None],
        [r for r in records if r.kind == "borderline"],
        [r for r in records if r.kind == "benign"],
    ]
    shares = [0] * len(groups)
    while sum(shares) < min(limit, sum(map(len, groups))):
        poorest = min((n for n, group in enumerate(groups) if shares[n] < len(group)), key=shares.__getitem__)
        shares[poorest] += 1
    in_turn = chain.from_iterable(zip_longest(*map(_spread, groups, shares)))
    return [record for record in in_turn if record is not None]


def _spread(group: Sequence[Record], number: int) -> list[Record]:
    """`number` of them, at even distances."""
    return [group[index * len(group) // number] for index in range(number)]
