"""The mask file: two ranked neuron sets with factors, named levels, and what they were made for.

Knows the file format and whether a mask fits a model. Knows nothing of how neurons are found or of
how they are modulated. Only safetensors is read: loading never executes anything from the file.

Format version 1: tensors `safety.neurons` and `utility.neurons`, int32 (n, 2) of (layer, index), most
important first, `safety.factors` and `utility.factors`, float32 (n,); one metadata entry `neurontune`
holding a JSON object, see `MaskMetadata`.
"""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Self

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field
from safetensors.numpy import save as save_tensors

from modulation.artefacts import Kind, check_made_for, read_file, read_metadata, read_tensors, write_whole
from modulation.errors import LevelError, MaskFileError, MaskFormatError, MaskMismatchError
from modulation.levels import SafetyLevels, Threshold

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FORMAT_VERSION: Final = 1
OPERATION: Final = "multiply"
SITE: Final = "mlp_output_projection_input"
LAYER_BASE: Final = 0
MASK: Final = Kind(
    name="mask",
    file="Mask file",
    metadata_key="neurontune",
    format_version=FORMAT_VERSION,
    unreadable=MaskFileError,
    malformed=MaskFormatError,
    mismatched=MaskMismatchError,
)
_TENSORS: Final = {
    "safety.neurons": (np.int32, 2),
    "safety.factors": (np.float32, 1),
    "utility.neurons": (np.int32, 2),
    "utility.factors": (np.float32, 1),
}
_INT32_END: Final = 1 << 31
# A neuron multiplied by more than this is a corrupt file, not a choice.
_LARGEST_FACTOR: Final = 1e4


class MaskMetadata(BaseModel):
    """What a mask says of itself. `levels` maps a level's name to (num_safety, num_utility)."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    format_version: int = FORMAT_VERSION
    operation: str = OPERATION
    site: str = SITE
    layer_base: int = LAYER_BASE
    model_id: str
    architecture: str
    model_fingerprint: str
    num_layers: int = Field(gt=0, lt=_INT32_END)
    neurons_per_layer: int = Field(gt=0, lt=_INT32_END)
    levels: dict[str, Annotated[tuple[int, int], Field(strict=False)]]
    method: dict[str, Any] = Field(default_factory=dict)
    data_digests: dict[str, str] = Field(default_factory=dict)
    seeds: dict[str, int] = Field(default_factory=dict)
    evaluation: dict[str, Any] = Field(default_factory=dict)


@dataclass(frozen=True)
class NeuronSet:
    """A ranked list of neurons of one kind, rank 0 first.

    `neurons` is int32 (n, 2) of (layer, index); `factors` is float32 (n,).
    """

    neurons: npt.NDArray[np.int32]
    factors: npt.NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.neurons)


@dataclass(frozen=True)
class Mask:
    """A valid mask. `digest` is the hexadecimal SHA-256 of its file, as `sha256sum` prints it."""

    safety: NeuronSet
    utility: NeuronSet
    metadata: MaskMetadata
    levels: SafetyLevels = field(init=False)
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        for kind, neurons in (("safety", self.safety), ("utility", self.utility)):
            _check_set(kind, neurons, self.metadata)
        both = np.concatenate([self.safety.neurons, self.utility.neurons])
        unique, counts = np.unique(both, axis=0, return_counts=True)
        if (counts > 1).any():
            layer, index = unique[counts > 1][0]
            raise MaskFormatError(
                f"Neuron {index} of layer {layer} is listed twice: the two sets together must name "
                "each neuron at most once."
            )
        maximum = Threshold(len(self.safety), len(self.utility))
        try:
            named = {name: Threshold(*counts) for name, counts in self.metadata.levels.items()}
            object.__setattr__(self, "levels", SafetyLevels(named, maximum))
        except LevelError as error:
            raise MaskFormatError(f"The mask's levels cannot be used: {error}") from error
        object.__setattr__(self, "digest", hashlib.sha256(self.to_bytes()).hexdigest())

    def to_bytes(self) -> bytes:
        """The file's contents. Equal masks give equal bytes."""
        tensors = {
            "safety.neurons": self.safety.neurons,
            "safety.factors": self.safety.factors,
            "utility.neurons": self.utility.neurons,
            "utility.factors": self.utility.factors,
        }
        metadata = json.dumps(self.metadata.model_dump(mode="json"))
        return save_tensors(tensors, metadata={MASK.metadata_key: metadata})

    def save(self, path: Path) -> None:
        """Write the mask file, whole or not at all."""
        write_whole(path, self.to_bytes())

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read and check a mask file.

        Raises:
            MaskFileError: missing, truncated, or not safetensors.
            MaskFormatError: tensors or metadata that do not make a mask.
        """
        contents = read_file(path, MASK)
        try:
            return cls.from_bytes(contents)
        except (MaskFileError, MaskFormatError) as error:
            raise type(error)(f"Mask file {path}: {error}") from error

    @classmethod
    def from_bytes(cls, contents: bytes) -> Self:
        """The mask that `to_bytes` wrote. Raises as `load` does."""
        tensors = read_tensors(contents, MASK)
        mask = cls(
            safety=_neuron_set("safety", tensors),
            utility=_neuron_set("utility", tensors),
            metadata=_metadata(contents),
        )
        object.__setattr__(mask, "digest", hashlib.sha256(contents).hexdigest())
        return mask

    def verify(self, model: "PreTrainedModel", fingerprint: str | None = None) -> None:
        """Check that this mask was made for `model`. `fingerprint` is that of its weights; None: they are in
        `model` itself.

        Raises:
            MaskMismatchError: another architecture, shape or set of weights.
            UnsupportedModelError: the model's family has no known sites.
        """
        check_made_for(model, self.metadata, MASK, fingerprint)


def describe(mask: Mask) -> str:
    """What is in a mask, as text for people."""
    metadata = mask.metadata
    total = metadata.num_layers * metadata.neurons_per_layer
    lines = [
        f"digest             {mask.digest}",
        f"model              {metadata.model_id} ({metadata.architecture})",
        f"model fingerprint  {metadata.model_fingerprint}",
        f"neurons            {metadata.num_layers} layers x {metadata.neurons_per_layer} = {total}",
        f"operation          {metadata.operation} at {metadata.site}, layers from {metadata.layer_base}",
        f"format version     {metadata.format_version}",
    ]
    for kind, neurons in (("safety", mask.safety), ("utility", mask.utility)):
        lines.append(f"{kind} set".ljust(19) + _describe_set(neurons, metadata.num_layers, total))
    lines.append("levels             name (num_safety, num_utility)")
    lines += [
        f"  {level.name:<17}({level.threshold.num_safety}, {level.threshold.num_utility})"
        for level in mask.levels
    ]
    for title, entries in (
        ("method", metadata.method),
        ("data digests", metadata.data_digests),
        ("seeds", metadata.seeds),
        ("evaluation", metadata.evaluation),
    ):
        text = json.dumps(entries, indent=2, sort_keys=True) if entries else "not recorded"
        lines.append(title.ljust(19) + text.replace("\n", "\n  "))
    return "\n".join(lines)


def _describe_set(neurons: NeuronSet, num_layers: int, total: int) -> str:
    if not len(neurons):
        return "empty"
    per_layer = np.bincount(neurons.neurons[:, 0], minlength=num_layers)
    factors = neurons.factors
    return (
        f"{len(neurons)} neurons ({len(neurons) / total:.2%}), factors {factors.min():g} to "
        f"{factors.max():g}, by layer {' '.join(str(count) for count in per_layer)}"
    )


def _neuron_set(kind: str, tensors: dict[str, npt.NDArray[Any]]) -> NeuronSet:
    unknown = sorted(set(tensors) - set(_TENSORS))
    if unknown:
        raise MaskFormatError(f"unknown tensor {unknown[0]!r}; a mask holds {', '.join(_TENSORS)}.")
    for name in (f"{kind}.neurons", f"{kind}.factors"):
        if name not in tensors:
            raise MaskFormatError(f"tensor {name!r} is missing; a mask holds {', '.join(_TENSORS)}.")
        dtype, dimensions = _TENSORS[name]
        if tensors[name].dtype != dtype or tensors[name].ndim != dimensions:
            raise MaskFormatError(
                f"tensor {name!r} is {tensors[name].dtype} with {tensors[name].ndim} dimensions; "
                f"expected {np.dtype(dtype)} with {dimensions}."
            )
    return NeuronSet(tensors[f"{kind}.neurons"], tensors[f"{kind}.factors"])


def _metadata(contents: bytes) -> MaskMetadata:
    metadata = read_metadata(contents, MASK, MaskMetadata)
    for name, value, expected in (
        ("operation", metadata.operation, OPERATION),
        ("site", metadata.site, SITE),
        ("layer_base", metadata.layer_base, LAYER_BASE),
    ):
        if value != expected:
            raise MaskFormatError(f"{name} {value!r} is not supported; this program applies {expected!r}.")
    return metadata


def _check_set(kind: str, neurons: NeuronSet, metadata: MaskMetadata) -> None:
    if neurons.neurons.shape != (len(neurons.factors), 2):
        raise MaskFormatError(
            f"{kind}.neurons has shape {neurons.neurons.shape} and {kind}.factors "
            f"{neurons.factors.shape}; expected (n, 2) and (n,)."
        )
    for column, name, bound in (
        (0, "layer", metadata.num_layers),
        (1, "neuron", metadata.neurons_per_layer),
    ):
        values = neurons.neurons[:, column]
        outside = values[(values < 0) | (values >= bound)]
        if len(outside):
            raise MaskFormatError(
                f"{kind}.neurons names {name} {outside[0]}; this mask's model has {bound} (0-{bound - 1})."
            )
    factors = neurons.factors
    wrong = factors[~(np.isfinite(factors) & (factors >= 0) & (factors <= _LARGEST_FACTOR))]
    if len(wrong):
        raise MaskFormatError(
            f"{kind}.factors holds {wrong[0]}; a factor is from 0 to {_LARGEST_FACTOR:g}, 1 = untouched."
        )
