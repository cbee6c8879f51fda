"""A model without its weights, and their fingerprint: for engines that load the weights themselves.

Knows transformers' model classes and checkpoints of safetensors. Reads one tensor at a time, so a model needs
no more memory here than its largest tensor.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from modulation.errors import ModelError
from modulation.fingerprints import fingerprint, fingerprint_of
from modulation.loading import load_model

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class ModelShape:
    """A model whose parameters have shapes and no values, and the fingerprint of the values they have."""

    model: PreTrainedModel
    fingerprint: str


def read_shape(model: str, *, trust_remote_code: bool = False) -> ModelShape:
    """The shape of a model in a folder or on the hub. Raises ModelError."""
    try:
        config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            shape = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                config, trust_remote_code=trust_remote_code
            )
    except Exception as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ModelError(f"Model {model!r} cannot be read: {reason}") from error
    try:
        shape.generation_config = GenerationConfig.from_pretrained(model)
    except OSError:
        pass  # what the configuration says of it stays
    tensors = _tensors(model, shape)
    if tensors is not None:
        return ModelShape(shape, fingerprint_of(tensors, lambda name: _read(*tensors[name])))
    # A checkpoint that names its tensors in a way of its own: transformers knows how to read it.
    whole = load_model(model, device="cpu", dtype="bfloat16", trust_remote_code=trust_remote_code)
    return ModelShape(shape, fingerprint(whole))


def _tensors(model: str, shape: PreTrainedModel) -> dict[str, tuple[Path, str]] | None:
    """Where each parameter's values are: a file and a name in it. None: not found by the names alone."""
    stored: dict[str, tuple[Path, tuple[int, ...]]] = {}
    for path in _files(model):
        with safe_open(path, framework="pt") as file:
            stored |= {name: (path, tuple(file.get_slice(name).get_shape())) for name in file.keys()}
    prefix = f"{shape.base_model_prefix}."
    found = {}
    for name, parameter in shape.named_parameters():
        key = next((key for key in (name, name.removeprefix(prefix)) if key in stored), None)
        if key is None or stored[key][1] != tuple(parameter.shape):
            return None
        found[name] = (stored[key][0], key)
    return found


def _files(model: str) -> list[Path]:
    """The checkpoint's files; none where it has no safetensors."""
    single = cached_file(model, _SINGLE, _raise_exceptions_for_missing_entries=False)
    if single is not None:
        return [Path(single)]
    index = cached_file(model, _INDEX, _raise_exceptions_for_missing_entries=False)
    if index is None:
        return []
    shards, _ = get_checkpoint_shard_files(model, index)  # type: ignore[no-untyped-call]
    return [Path(shard) for shard in shards]


def _read(path: Path, name: str) -> Tensor:
    with safe_open(path, framework="pt") as file:
        tensor: Tensor = file.get_tensor(name)
        return tensor
