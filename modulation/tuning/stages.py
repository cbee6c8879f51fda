"""One checkpoint file for a run of several stages: what a stage began with, beside what it has reached.

Knows masks' neurons and checkpoints. Knows nothing of what a stage does.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy.typing as npt

from modulation.checkpoints import Arrays, Checkpoint, Reached
from modulation.masks import Mask, NeuronSet
from modulation.tuning.pruning import with_sets

_BEGUN: Final = "begun."


@dataclass(frozen=True)
class Stage:
    """A stage's part of the run's checkpoint, where the run has one. It began with `mask`."""

    checkpoint: Checkpoint | None
    number: int
    mask: Mask

    @classmethod
    def reached(cls, checkpoint: Checkpoint | None, mask: Mask) -> "Stage":
        """The stage in which an interrupted run was; where there was none the first, which begins with
        `mask`. Raises CheckpointError as `Checkpoint.load` does."""
        reached = checkpoint.load() if checkpoint else None
        if reached is None:
            return cls(checkpoint, 0, mask)
        safety, utility = (
            NeuronSet(reached.arrays[f"{_BEGUN}{kind}.neurons"], reached.arrays[f"{_BEGUN}{kind}.factors"])
            for kind in ("safety", "utility")
        )
        return cls(checkpoint, reached.progress["stage"], with_sets(mask, safety, utility))

    def followed_by(self, mask: Mask) -> "Stage":
        """The next stage, which begins with `mask`. From now on this one is not repeated."""
        following = Stage(self.checkpoint, self.number + 1, mask)
        following.save({}, None)
        return following

    @property
    def is_due(self) -> bool:
        return self.checkpoint is not None and self.checkpoint.is_due

    def load(self) -> Reached | None:
        """What this stage has reached, None where it has only begun."""
        reached = self.checkpoint.load() if self.checkpoint else None
        if reached is None or reached.progress["within"] is None:
            return None
        arrays = {name: each for name, each in reached.arrays.items() if not name.startswith(_BEGUN)}
        return Reached(arrays, reached.progress["within"])

    def save(self, arrays: Mapping[str, npt.NDArray[Any]], progress: dict[str, Any] | None) -> None:
        """Write the run's checkpoint, where it has one."""
        if self.checkpoint:
            self.checkpoint.save({**self._begun(), **arrays}, {"stage": self.number, "within": progress})

    def _begun(self) -> Arrays:
        sets = {"safety": self.mask.safety, "utility": self.mask.utility}
        return {
            f"{_BEGUN}{kind}.{name}": getattr(each, name)
            for kind, each in sets.items()
            for name in ("neurons", "factors")
        }
