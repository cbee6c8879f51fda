"""Records of which there may be very many: one of a kind in a second, and how many were left out.

Knows records by their kind and the time. Knows no file and no HTTP.
"""

import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, Final

SECONDS: Final = 1.0
LEFT_OUT: Final = "num_left_out"

Record = Mapping[str, Any]


@dataclass
class _Kind:
    since: float
    num_left_out: int = 0
    last: Record | None = None


class Thinned:
    """Writes the first record of a kind at once. Of those that come within a second after it the last one is
    kept, and written with the number of those before it when that second is over, by the next call. So each
    is written or counted."""

    def __init__(
        self, write: Callable[[Record], object], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._write: Final = write
        self._clock: Final = clock
        self._kinds: Final[OrderedDict[Hashable, _Kind]] = OrderedDict()  # the oldest first

    def write(self, kind: Hashable, record: Record) -> None:
        """Write the record of this kind, or count it."""
        self.write_due()
        found = self._kinds.get(kind)
        if found is None:
            self._kinds[kind] = _Kind(self._clock())
            self._write(record)
        else:
            found.num_left_out += found.last is not None
            found.last = record

    def write_due(self) -> None:
        """Write what is kept of seconds that are over."""
        self._write_those_before(self._clock() - SECONDS)

    def close(self) -> None:
        """Write what is kept."""
        self._write_those_before(self._clock())

    def _write_those_before(self, moment: float) -> None:
        while self._kinds:
            kind, found = next(iter(self._kinds.items()))
            if found.since > moment:
                return
            del self._kinds[kind]
            if found.last is not None:
                self._write({**found.last, LEFT_OUT: found.num_left_out})
