"""Load a model and its tokenizer, and decide device and dtype, each with a reason.

Knows files and hardware. Knows nothing of masks or of what the model is loaded for.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from modulation.errors import ModelError

_DTYPES: Final = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True, slots=True)
class Resolved:
    """A setting's value and why it has it, as `value (reason)` in text."""

    value: str
    reason: str

    def __str__(self) -> str:
        return f"{self.value} ({self.reason})"


def resolve_device(device: str) -> Resolved:
    """`cpu` or `cuda`. Raises ModelError for a device that is not there."""
    has_cuda = torch.cuda.is_available()
    if device == "auto":
        if has_cuda:
            return Resolved("cuda", f"auto: {torch.cuda.get_device_name()}")
        return Resolved("cpu", "auto: no CUDA device")
    if device == "cuda" and not has_cuda:
        raise ModelError("Device 'cuda' was asked for, but torch sees no CUDA device. Use 'cpu' or 'auto'.")
    return Resolved(device, "as asked")


def resolve_dtype(dtype: str, device: str) -> Resolved:
    """`float32`, `bfloat16` or `float16`."""
    if dtype == "auto":
        return Resolved("bfloat16" if device == "cuda" else "float32", f"auto: {device}")
    return Resolved(dtype, "as asked")


def load_tokenizer(model: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerFast:
    """The model's tokenizer. Raises ModelError where there is none, or none with a chat template.

    `trust_remote_code` runs Python code that comes with the model.
    """
    _refuse_missing_folder(model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise ModelError(
            f"Model {model!r} has no usable tokenizer ({_first_line(error)}). Its folder needs "
            "tokenizer.json and tokenizer_config.json."
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast) or tokenizer.vocab_size < 1:
        raise ModelError(
            f"Model {model!r} has no usable tokenizer: its folder needs tokenizer.json and "
            "tokenizer_config.json."
        )
    if tokenizer.chat_template is None:
        raise ModelError(
            f"The tokenizer of model {model!r} has no chat template, so it cannot serve chats: use "
            "an instruction-tuned model, or put a chat_template.jinja into its folder."
        )
    return tokenizer


def load_model(model: str, *, device: str, dtype: str, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model in evaluation mode on `device`, from safetensors alone: nothing is unpickled.

    `trust_remote_code` runs Python code that comes with the model. Raises ModelError.
    """
    _refuse_missing_folder(model)
    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            model, dtype=_DTYPES[dtype], use_safetensors=True, trust_remote_code=trust_remote_code
        )
    except Exception as error:
        raise ModelError(f"Model {model!r} cannot be loaded: {_first_line(error)}") from error
    assert isinstance(loaded, PreTrainedModel), type(loaded)
    loaded.to(device)  # type: ignore[arg-type]
    loaded.train(False)
    return loaded


def _refuse_missing_folder(model: str) -> None:
    """A path that is not there reads to the hub client like a malformed name; say it plainly."""
    looks_like_path = model.startswith((".", "/", "~")) or model.count("/") > 1
    if looks_like_path and not Path(model).is_dir():
        raise ModelError(f"Model folder {model!r} does not exist.")


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
