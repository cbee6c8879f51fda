"""LoRA adapters that requests ask vLLM for by name, beside modulation.

Knows PEFT's configuration file and vLLM's requests. Knows nothing of levels.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from safetensors import SafetensorError, safe_open
from torch import nn
from vllm.lora.request import LoRARequest

from modulation.errors import ModelError
from modulation.export.lora import VLLM_RANKS, padded_rank
from modulation.files import read_regular

MAX_CONFIG_BYTES: Final = 2**20
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,127}")
_MATRIX: Final = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
_WHAT: Final = "lora {text!r}: give NAME=FOLDER, for example cooking=adapters/cooking."


@dataclass(frozen=True)
class Adapters:
    """Adapters by the names that requests ask for; `largest_rank` is that of any layer of any of them."""

    by_name: Mapping[str, LoRARequest]
    largest_rank: int

    @property
    def arguments(self) -> dict[str, Any]:
        """vLLM's arguments to serve them. On CPU vLLM 0.32 gives requests without an adapter the one that has
        the last place; so one place always stays free."""
        if not self.by_name:
            return {}
        return {
            "enable_lora": True,
            "max_loras": len(self.by_name) + 1,
            "max_lora_rank": padded_rank(self.largest_rank),
        }


def read_adapters(given: Sequence[str], served: str, model: nn.Module) -> Adapters:
    """What `given` names, as NAME=FOLDER; `served` is the name that `model` itself has.

    Raises ModelError for what is none, for a name that is taken, and for a folder that holds no adapter, or
    one for another model: vLLM itself would pass over what it finds no place for.
    """
    found: dict[str, LoRARequest] = {}
    ranks = [1]
    for number, text in enumerate(given, start=1):
        name, equals, folder = text.partition("=")
        if not equals or not folder:
            raise ModelError(_WHAT.format(text=text))
        if not _NAME.fullmatch(name):
            raise ModelError(f"lora {text!r}: a name has letters, digits and . _ - / alone, at most 128.")
        if name == served or name in found:
            raise ModelError(f"lora {text!r}: the name {name} is taken. Give each adapter one of its own.")
        _refuse_misfit(Path(folder), model)
        ranks.append(_rank(Path(folder)))
        found[name] = LoRARequest(lora_name=name, lora_int_id=number, lora_path=str(Path(folder).resolve()))
    return Adapters(found, max(ranks))


def _refuse_misfit(folder: Path, model: nn.Module) -> None:
    path = folder / "adapter_model.safetensors"
    if not path.is_file():
        raise ModelError(
            f"LoRA adapter {folder}: it holds no {path.name}. PEFT writes one (safe_serialization=True); "
            "nothing is unpickled here."
        )
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        raise ModelError(f"LoRA adapter {folder}: {path.name} cannot be read ({error}).") from error
    if not shapes:
        raise ModelError(f"LoRA adapter {folder}: {path.name} is empty.")
    modules = dict(model.named_modules())
    for name, shape in shapes.items():
        found = _MATRIX.fullmatch(name)
        module = modules.get(found["module"]) if found else None
        if found is None or not isinstance(module, nn.Linear):
            raise ModelError(
                f"LoRA adapter {folder}: {name} is no matrix for a linear layer of this model. Adapters of "
                "other models, and of layers that are not linear, cannot be served."
            )
        if "lm_head" in name:
            raise ModelError(
                f"LoRA adapter {folder} changes the output layer ({name}), which is not supported: vLLM's "
                "log-probabilities of prompts would not be of the adapted model. Train it without lm_head."
            )
        width = shape[1] if found["side"] == "A" else shape[0]
        expected = module.in_features if found["side"] == "A" else module.out_features
        if len(shape) != 2 or width != expected:
            raise ModelError(
                f"LoRA adapter {folder}: {name} has shape {shape}, and the layer is {expected} wide there. "
                "It was trained on another model."
            )


def _rank(folder: Path) -> int:
    path = folder / "adapter_config.json"
    try:
        config = json.loads(read_regular(path, MAX_CONFIG_BYTES))
        ranks = [config["r"], *config.get("rank_pattern", {}).values()]
        rank = max(int(each) for each in ranks)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ModelError(f"LoRA adapter {folder}: {path.name} cannot be read ({error}).") from error
    if not 1 <= rank <= VLLM_RANKS[-1]:
        raise ModelError(f"LoRA adapter {folder} has rank {rank}; vLLM takes at most {VLLM_RANKS[-1]}.")
    return rank
