"""Artefacts: safetensors files of ours with one metadata entry of JSON, some made for one model.

Knows how such a file is read, checked and written whole. Knows nothing of what the kinds of artefact
hold. Only safetensors is read: loading never executes anything from a file. Imports no torch.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar

import numpy.typing as npt
from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors

from modulation.errors import NeuronTuneError
from modulation.files import read_regular

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MAX_BYTES: Final = 2**30
M = TypeVar("M", bound=BaseModel)

_FRAMING: Final = "__metadata__"


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of artefact: what one is called and how its file, its metadata entry, format and errors.

    `unreadable`: missing, truncated, not safetensors; `malformed`: safetensors with other contents;
    `mismatched`: valid, but made for another model.
    """

    name: str
    file: str
    metadata_key: str
    format_version: int
    unreadable: type[NeuronTuneError]
    malformed: type[NeuronTuneError]
    mismatched: type[NeuronTuneError]


class MadeFor(Protocol):
    """What an artefact's metadata say of the model that it was made for."""

    @property
    def model_id(self) -> str: ...
    @property
    def architecture(self) -> str: ...
    @property
    def model_fingerprint(self) -> str: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def neurons_per_layer(self) -> int: ...


def read_file(path: Path, kind: Kind) -> bytes:
    """The file's bytes; raises `kind.unreadable`."""
    try:
        return read_regular(path, MAX_BYTES)
    except OSError as error:
        raise kind.unreadable(f"{kind.file} {path} cannot be read: {error.strerror}.") from error


def write_whole(path: Path, contents: bytes) -> None:
    """Write the file, whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(contents)
    partial.replace(path)


def read_tensors(contents: bytes, kind: Kind) -> dict[str, npt.NDArray[Any]]:
    """The file's tensors; raises `kind.unreadable`."""
    # A safetensors file begins with the length of its header, a brace: the same bytes may be both.
    if (contents[:2] == b"PK" or contents[:1] == b"\x80") and contents[8:9] != b"{":
        raise kind.unreadable(
            "this is a pickle or torch.save archive, not safetensors. It was not opened, since "
            f"reading a pickle can run code; a {kind.name} is safetensors."
        )
    try:
        return load_tensors(contents)
    except (SafetensorError, KeyError, ValueError) as error:
        raise kind.unreadable(f"not a whole safetensors file ({error}). Copy or make it again.") from error


def read_metadata(contents: bytes, kind: Kind, model: type[M]) -> M:
    """The metadata entry of a safetensors file as a `model`; raises `kind.malformed`."""
    header_size = int.from_bytes(contents[:8], "little")
    entries = _json_object(contents[8 : 8 + header_size], "header", kind).get(_FRAMING) or {}
    key = kind.metadata_key
    if key not in entries:
        raise kind.malformed(
            f"this is a safetensors file without the metadata entry {key!r}: not a {kind.name}."
        )
    for name in entries:
        if name != key:
            raise kind.malformed(f"unknown metadata entry {name!r}; a {kind.name} has only {key!r}.")
    raw = _json_object(entries[key], "metadata", kind)
    version = raw.get("format_version")
    if version != kind.format_version or not isinstance(version, int) or isinstance(version, bool):
        raise kind.malformed(
            f"format version {version!r} is not supported; this program reads {kind.format_version}."
        )
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise kind.malformed(f"metadata field {where!r}: {first['msg']}.") from error


def _json_object(text: str | bytes, what: str, kind: Kind) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:  # also numbers of thousands of digits
        raise kind.malformed(f"the {what} is not JSON that can be read ({error}).") from error
    if not isinstance(value, dict):
        raise kind.malformed(f"the {what} is not a JSON object.")
    return value


def check_made_for(
    model: "PreTrainedModel", expected: MadeFor, kind: Kind, actual: str | None = None
) -> None:
    """Check that an artefact was made for `model`. `actual` is the fingerprint of the model's weights; None:
    they are in `model` itself.

    Raises:
        kind.mismatched: another architecture, shape or set of weights.
        UnsupportedModelError: the model's family has no known sites.
    """
    # Imported here, so that an artefact can be read and shown without loading torch.
    from modulation.fingerprints import fingerprint
    from modulation.sites import find_sites

    sites = find_sites(model)
    made, way_out = f"The {kind.name} was made for", f"Use this model's own {kind.name}."
    architecture = type(model).__name__
    if architecture != expected.architecture:
        raise kind.mismatched(
            f"{made} architecture {expected.architecture} ({expected.model_id}); "
            f"this model is {architecture}. {way_out}"
        )
    if len(sites) != expected.num_layers:
        raise kind.mismatched(
            f"{made} {expected.num_layers} layers ({expected.model_id}); "
            f"this model has {len(sites)}. {way_out}"
        )
    for site in sites:
        if site.width != expected.neurons_per_layer:
            raise kind.mismatched(
                f"{made} {expected.neurons_per_layer} neurons per layer ({expected.model_id}); "
                f"layer {site.layer} of this model has {site.width}. {way_out}"
            )
    actual = fingerprint(model) if actual is None else actual
    if actual != expected.model_fingerprint:
        raise kind.mismatched(
            f"{made} weights with fingerprint {expected.model_fingerprint} ({expected.model_id}); "
            f"this model's is {actual}. The architecture is the same but the weights are not: use "
            f"this model's own {kind.name}, or make one for these weights."
        )
