"""What a command was told to open: a model by its name, where it runs, and the mask made for it.

Knows that `demo` is the shipped model and has a mask. Knows nothing of what they are opened for. Imports
what is heavy when something is opened.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from modulation.demo import DEMO, MASK_FILE, MODEL_DIR
from modulation.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from modulation.loading import Resolved
    from modulation.masks import Mask


@dataclass(frozen=True)
class Opened:
    """A model and its tokenizer; as text, where it runs and what its weights are kept as, and why."""

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerFast"
    device: "Resolved"
    dtype: "Resolved"

    def __str__(self) -> str:
        return f"device {self.device}, dtype {self.dtype}"


def open_model(model: str, device: str, dtype: str) -> Opened:
    """`demo`, a folder or a hub name. Raises ModelError."""
    from modulation.loading import load_model, load_tokenizer, resolve_device, resolve_dtype

    folder = str(MODEL_DIR) if model == DEMO else model
    on = resolve_device(device)
    kept_as = resolve_dtype(dtype, on.value)
    tokenizer = load_tokenizer(folder)
    return Opened(load_model(folder, device=on.value, dtype=kept_as.value), tokenizer, on, kept_as)


def open_mask(model: str, mask: Path | None) -> "Mask":
    """The mask in a file; left out, the shipped one of the demo model. Raises DataError or MaskError."""
    if mask is None and model != DEMO:
        raise DataError(
            f"--mask is missing: model {model!r} has no shipped mask. Name the file of a mask made for it."
        )
    from modulation.masks import Mask

    return Mask.load(mask or MASK_FILE)


def model_id(model: str) -> str:
    """What artefacts call a model: a folder by its own name, so that files tell nothing of the machine."""
    if model == DEMO:
        return "neurontune-demo"
    return Path(model).resolve().name if Path(model).is_dir() else model
