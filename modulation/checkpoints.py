"""Checkpoints: what a long run has reached, so that the same command goes on after an interruption.

Knows a file, a key that says which run it belongs to, and when it was last written. Knows nothing of
what the numbers mean. Tensors come back bit for bit.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol

import numpy.typing as npt
from pydantic import BaseModel, ConfigDict
from safetensors.numpy import save as save_tensors

from modulation.artefacts import Kind, read_file, read_metadata, read_tensors, write_whole
from modulation.errors import CheckpointError

CHECKPOINT: Final = Kind(
    name="checkpoint",
    file="Checkpoint",
    metadata_key="neurontune_checkpoint",
    format_version=1,
    unreadable=CheckpointError,
    malformed=CheckpointError,
    mismatched=CheckpointError,
)

Arrays = dict[str, npt.NDArray[Any]]


class _Metadata(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    format_version: int = CHECKPOINT.format_version
    key: str
    progress: dict[str, Any]


@dataclass(frozen=True)
class Reached:
    """What a run has reached: arrays by name, and counters as a JSON object."""

    arrays: Arrays
    progress: dict[str, Any]


class Savings(Protocol):
    """What a long computation goes on from: a checkpoint file, or its part of one."""

    @property
    def is_due(self) -> bool: ...

    def load(self) -> Reached | None: ...

    def save(self, arrays: Mapping[str, npt.NDArray[Any]], progress: dict[str, Any]) -> None: ...


def checkpoint_beside(out: Path) -> Path:
    """Where the checkpoint of what will be written to `out` stands meanwhile."""
    return out.with_name(out.name + ".checkpoint")


@dataclass
class Checkpoint:
    """A run's checkpoint file. `key` is a digest of everything that the run's result depends on."""

    path: Path
    key: str
    seconds_between: float = 5.0
    _last: float = field(default_factory=time.monotonic, init=False)

    def load(self) -> Reached | None:
        """What an interrupted run left, None where there is no file.

        Raises CheckpointError for a damaged file and for one of another run: nothing that somebody
        may still need is overwritten.
        """
        if not self.path.exists():
            return None
        contents = read_file(self.path, CHECKPOINT)
        try:
            arrays = read_tensors(contents, CHECKPOINT)
            metadata = read_metadata(contents, CHECKPOINT, _Metadata)
        except CheckpointError as error:
            raise CheckpointError(
                f"Checkpoint {self.path}: {error} Delete the file to begin anew."
            ) from error
        if metadata.key != self.key:
            raise CheckpointError(
                f"Checkpoint {self.path} belongs to another run: its key is {metadata.key}, this run's is "
                f"{self.key} (the model, the data, the method, an option or the seed differs). Run that "
                "command again to finish it, or delete the file to begin anew."
            )
        return Reached(arrays, metadata.progress)

    @property
    def is_due(self) -> bool:
        """Whether the file was last written long enough ago."""
        return time.monotonic() - self._last >= self.seconds_between

    def save(self, arrays: Mapping[str, npt.NDArray[Any]], progress: dict[str, Any]) -> None:
        """Write the file, whole or not at all."""
        text = _Metadata(key=self.key, progress=progress).model_dump_json()
        write_whole(self.path, save_tensors(dict(arrays), metadata={CHECKPOINT.metadata_key: text}))
        self._last = time.monotonic()

    def remove(self) -> None:
        """The run is done; nothing needs going on with."""
        self.path.unlink(missing_ok=True)
