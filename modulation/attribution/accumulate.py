"""Running sums over examples, batch by batch, with progress and a checkpoint.

Knows passes, batches and float32 sums of one score per neuron. Knows nothing of models or methods.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from torch import Tensor, from_numpy

from modulation.checkpoints import Checkpoint

T = TypeVar("T")

OnProgress = Callable[[str, int, int], object]
"""Told the pass at work, and how many examples of all passes together are done, of how many."""


@dataclass(frozen=True)
class Pass(Generic[T]):
    """One way through some examples. `step` gives a batch's sums by name, always the same names, float32
    with one score per neuron; its result depends on nothing but the batch."""

    name: str
    items: Sequence[T]
    step: Callable[[Sequence[T]], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Totals:
    """What a pass summed up, over `count` examples."""

    count: int
    sums: Mapping[str, Tensor]

    def mean(self, name: str) -> Tensor:
        """The sum called `name`, divided by the number of examples."""
        return self.sums[name] / self.count


class Accumulator:
    """Runs the passes of one attribution. Without a checkpoint everything stays in memory.

    With one, a run that was killed and is started again adds the same numbers in the same order as
    one that was not: the result is the same bit for bit.
    """

    def __init__(
        self,
        *,
        batch_size: int = 16,
        checkpoint: Checkpoint | None = None,
        on_progress: OnProgress = lambda _name, _done, _total: None,
    ) -> None:
        assert batch_size > 0, batch_size
        self._batch_size = batch_size
        self._checkpoint = checkpoint
        self._on_progress = on_progress

    def run(self, passes: Sequence[Pass[Any]]) -> dict[str, Totals]:
        """The totals of every pass, by name. All passes are given at once, so that time left is known.

        Raises CheckpointError where the checkpoint cannot be gone on with.
        """
        assert len({each.name for each in passes}) == len(passes), [each.name for each in passes]
        state = _State.restored(self._checkpoint)
        total = sum(len(each.items) for each in passes)
        for each in passes:
            self._on_progress(each.name, state.num_done, total)
            for start in range(state.done.get(each.name, 0), len(each.items), self._batch_size):
                batch = each.items[start : start + self._batch_size]
                state.add(each.name, len(batch), each.step(batch))
                if self._checkpoint and (state.done[each.name] == len(each.items) or self._checkpoint.is_due):
                    state.save(self._checkpoint)
                self._on_progress(each.name, state.num_done, total)
        return {each.name: Totals(len(each.items), state.sums.get(each.name, {})) for each in passes}

    def remove_checkpoint(self) -> None:
        """To be called once the result is safe."""
        if self._checkpoint:
            self._checkpoint.remove()


@dataclass
class _State:
    """Sums by pass and name, and how many examples of each pass are in them."""

    sums: dict[str, dict[str, Tensor]]
    done: dict[str, int]

    @classmethod
    def restored(cls, checkpoint: Checkpoint | None) -> "_State":
        reached = checkpoint.load() if checkpoint else None
        if reached is None:
            return cls({}, {})
        sums: dict[str, dict[str, Tensor]] = {}
        for key, array in reached.arrays.items():
            name, what = json.loads(key)
            sums.setdefault(name, {})[what] = from_numpy(array.copy())
        return cls(sums, reached.progress)

    @property
    def num_done(self) -> int:
        return sum(self.done.values())

    def add(self, name: str, num_examples: int, values: Mapping[str, Tensor]) -> None:
        sums = self.sums.setdefault(name, {})
        for what, value in values.items():
            value = value.detach().float().cpu()
            sums[what] = sums[what] + value if what in sums else value
        self.done[name] = self.done.get(name, 0) + num_examples

    def save(self, checkpoint: Checkpoint) -> None:
        arrays = {
            json.dumps([name, what]): value.numpy()
            for name, sums in self.sums.items()
            for what, value in sums.items()
        }
        checkpoint.save(arrays, self.done)
