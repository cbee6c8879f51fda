"""What has been asked, injected, answered and lost, and which lines of the audit log that must have left.

Knows names and counts. Knows no HTTP.
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import Self


class LostError(Exception):
    """A request that was not answered as it should have been. The text says how."""


@dataclass
class Tally:
    """What one party of the soak has seen; parties add up.

    `deviation` is the largest difference of a token's log-probability from that of its reference.
    `audited` maps the ids of requests that must leave one line to key and status (None: not known); those
    in `perhaps` may leave one. `reloads` counts lines of reloads by what and whether it succeeded.
    """

    answered: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    statuses: Counter[int] = field(default_factory=Counter)
    reloads: Counter[tuple[str, bool]] = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)
    num_sent: int = 0
    num_tokens: int = 0
    deviation: float = 0.0
    audited: dict[str, tuple[str | None, int | None]] = field(default_factory=dict)
    perhaps: set[str] = field(default_factory=set)

    def __iadd__(self, other: Self) -> Self:
        self.answered += other.answered
        self.faults += other.faults
        self.statuses += other.statuses
        self.reloads += other.reloads
        self.lost += other.lost
        self.num_sent += other.num_sent
        self.num_tokens += other.num_tokens
        self.deviation = max(self.deviation, other.deviation)
        self.audited |= other.audited
        self.perhaps |= other.perhaps
        return self
