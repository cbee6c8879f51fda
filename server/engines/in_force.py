"""What is in force, what was before, and who still holds which, so that a swap waits for nobody.

Knows digests and holders. Knows no mask, no model, no torch.
"""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from server.engines.base import EngineUnavailableError

T = TypeVar("T")


@dataclass
class Known(Generic[T]):
    """A thing that requests may run under; `number` is its own for as long as the engine lives."""

    number: int
    digest: str
    value: T
    num_holders: int = field(default=0)


class InForce(Generic[T]):
    """One thing in force at a time, and those before it for as long as they are needed.

    The one in force, the one before it and those that are held are known by their digests; others are
    forgotten. Calls come from one thread.
    """

    def __init__(self, digest: str, value: T) -> None:
        self._numbers = itertools.count()
        self.current: Known[T] = Known(next(self._numbers), digest, value)
        self._before = self.current
        self._known = {digest: self.current}

    def values(self) -> list[T]:
        """All that are known."""
        return [each.value for each in self._known.values()]

    def find(self, digest: str) -> Known[T] | None:
        """The thing of this digest, if it is still known."""
        return self._known.get(digest)

    def put(self, digest: str, value: T) -> None:
        """From now on this is in force."""
        assert digest not in self._known, digest
        self._known[digest] = Known(next(self._numbers), digest, value)
        self.put_back(digest)

    def put_back(self, digest: str) -> None:
        """From now on what is known by this digest is in force."""
        if digest != self.current.digest:
            self._before, self.current = self.current, self._known[digest]
        self._forget()

    @contextmanager
    def held(self, digest: str | None) -> Iterator[Known[T]]:
        """Keep what has this digest, or what is in force, known within the block.

        Raises:
            EngineUnavailableError: it is not known any more.
        """
        found = self.current if digest is None else self._known.get(digest)
        if found is None:
            raise EngineUnavailableError(
                f"The mask {digest} was replaced, and replaced again, before this request began; in force "
                f"is {self.current.digest}. Send the request again.",
                retry_after_seconds=1,
            )
        found.num_holders += 1
        try:
            yield found
        finally:
            found.num_holders -= 1
            self._forget()

    def _forget(self) -> None:
        kept = {self.current.digest, self._before.digest}
        self._known = {
            digest: each for digest, each in self._known.items() if digest in kept or each.num_holders
        }
