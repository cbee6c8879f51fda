"""The scores file: one score per neuron and kind, and what they were computed from.

Knows the file format and whether scores fit a model. Knows no method. Imports no torch by itself.

Format version 1: tensors `safety` and `utility`, float32 (layers, neurons); one metadata entry
`neurontune_scores` holding a JSON object, see `ScoresMetadata`.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field
from safetensors.numpy import save as save_tensors

from modulation.artefacts import Kind, check_made_for, read_file, read_metadata, read_tensors, write_whole
from modulation.errors import ScoresError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from modulation.attribution.base import Scores

SCORES: Final = Kind(
    name="scores file",
    file="Scores file",
    metadata_key="neurontune_scores",
    format_version=1,
    unreadable=ScoresError,
    malformed=ScoresError,
    mismatched=ScoresError,
)
_TENSORS: Final = ("safety", "utility")


class ScoresMetadata(BaseModel):
    """What scores say of themselves. `options` holds every option of the method, defaults included;
    `data_digest` covers prompts and answers."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    format_version: int = SCORES.format_version
    method: str
    options: dict[str, Any]
    model_id: str
    architecture: str
    model_fingerprint: str
    num_layers: int = Field(gt=0)
    neurons_per_layer: int = Field(gt=0)
    data_digest: str
    seed: int
    dtype: str
    batch_size: int


@dataclass(frozen=True)
class ScoresFile:
    """Valid scores: both float32 (layers, neurons), finite, of the metadata's shape."""

    safety: npt.NDArray[np.float32]
    utility: npt.NDArray[np.float32]
    metadata: ScoresMetadata

    def __post_init__(self) -> None:
        shape = (self.metadata.num_layers, self.metadata.neurons_per_layer)
        for name in _TENSORS:
            values = getattr(self, name)
            if values.dtype != np.float32 or values.shape != shape:
                raise ScoresError(
                    f"tensor {name!r} is {values.dtype} of shape {values.shape}; expected float32 of {shape}."
                )
            wrong = np.argwhere(~np.isfinite(values))
            if len(wrong):
                raise ScoresError(
                    f"tensor {name!r} holds {values[tuple(wrong[0])]} for neuron {wrong[0][1]} of layer "
                    f"{wrong[0][0]}, {len(wrong)} in all are not finite: attribute again, with dtype "
                    "bfloat16 or float32."
                )

    def to_bytes(self) -> bytes:
        """The file's contents. Equal scores give equal bytes."""
        metadata = json.dumps(self.metadata.model_dump(mode="json"))
        tensors = {name: np.ascontiguousarray(getattr(self, name)) for name in _TENSORS}
        return save_tensors(tensors, metadata={SCORES.metadata_key: metadata})

    def save(self, path: Path) -> None:
        """Write the scores file, whole or not at all."""
        write_whole(path, self.to_bytes())

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read and check a scores file.

        Raises:
            ScoresError: missing, truncated, not safetensors, or not scores.
        """
        contents = read_file(path, SCORES)
        try:
            tensors = read_tensors(contents, SCORES)
            metadata = read_metadata(contents, SCORES, ScoresMetadata)
            if set(tensors) != set(_TENSORS):
                raise ScoresError(
                    f"it holds the tensors {', '.join(sorted(tensors)) or 'none'}; a scores file holds "
                    f"{' and '.join(_TENSORS)}."
                )
            return cls(tensors["safety"], tensors["utility"], metadata)
        except ScoresError as error:
            raise ScoresError(f"Scores file {path}: {error}") from error

    def verify(self, model: "PreTrainedModel") -> None:
        """Check that these scores were computed for `model`.

        Raises:
            ScoresError: another architecture, shape or set of weights.
            UnsupportedModelError: the model's family has no known sites.
        """
        check_made_for(model, self.metadata, SCORES)

    @property
    def scores(self) -> "Scores":
        """As methods give them and `ranked_sets` takes them."""
        from torch import from_numpy

        from modulation.attribution.base import Scores

        return Scores(safety=from_numpy(self.safety), utility=from_numpy(self.utility))
