"""A level as a LoRA adapter in PEFT's format.

Knows PEFT's two files. Knows nothing of how levels are chosen or of where folders go.

Multiplying neuron i of a layer by g adds (g - 1) W[:, i] a[i] to what the output projection W says. That is a
LoRA of one rank per active neuron: A has a row with a single 1 at i, B the column W[:, i] (g - 1). Scaling,
`lora_alpha` over rank, is 1 everywhere.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save_file
from torch import Tensor

from modulation.export.source import Scaled, columns_of, rounded
from modulation.sites import Site, input_dimension

VLLM_RANKS: Final = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What `vllm serve --max-lora-rank` accepts (0.32)."""

_PADDED_RANKS: Final = VLLM_RANKS[1:]
_PREFIX: Final = "base_model.model."


@dataclass(frozen=True)
class Adapter:
    """An adapter: the tensors of its file and its configuration."""

    tensors: dict[str, Tensor]
    config: dict[str, Any]

    @property
    def rank(self) -> int:
        """The largest rank of a layer."""
        return int(self.config["r"])

    def save(self, folder: Path) -> None:
        """Write both files into `folder`."""
        save_file(self.tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        (folder / "adapter_config.json").write_text(json.dumps(self.config, indent=2) + "\n")


def lora_adapter(
    sites: Sequence[Site], active: Sequence[Scaled], dtype: torch.dtype, base: str, *, padded: bool
) -> Adapter:
    """The adapter of the `active` neurons of a model with `sites`, called `base`.

    Each layer has as many ranks as active neurons, none has no adapter; `padded`: every layer has one and the
    same rank, the least of vLLM's that is enough, filled up with zeros.

    Raises ExportError where a value is too large for `dtype`.
    """
    assert active
    by_layer = {each.site.layer: each for each in active}
    ranks = {site.name: len(by_layer[site.layer].columns) for site in sites if site.layer in by_layer}
    rank = padded_rank(max(ranks.values())) if padded else max(ranks.values())
    tensors: dict[str, Tensor] = {}
    for site in sites:
        if site.layer in by_layer or padded:
            down, up = _matrices(site, by_layer.get(site.layer), dtype, rank if padded else None)
            tensors[f"{_PREFIX}{site.name}.lora_A.weight"] = down
            tensors[f"{_PREFIX}{site.name}.lora_B.weight"] = up
    own = {} if padded else {name: each for name, each in ranks.items() if each != rank}
    targets = [_common_name(sites)] if padded else list(ranks)
    return Adapter(tensors, _config(base, rank, own, targets, sites[0]))


def padded_rank(rank: int) -> int:
    """The least rank of vLLM's that is enough; beyond them, `rank` itself."""
    return next((each for each in _PADDED_RANKS if each >= rank), rank)


def _matrices(
    site: Site, scaled: Scaled | None, dtype: torch.dtype, padded_to: int | None
) -> tuple[Tensor, Tensor]:
    """A (rank, in) and B (out, rank)."""
    weight = site.module.weight
    assert isinstance(weight, Tensor)
    across = input_dimension(site.module)
    number = 0 if scaled is None else len(scaled.columns)
    rank = number if padded_to is None else padded_to
    down = torch.zeros(rank, site.width, dtype=dtype)
    up = torch.zeros(int(weight.shape[1 - across]), rank, dtype=dtype)
    if scaled is not None:
        down[torch.arange(number), scaled.columns] = 1.0
        up[:, :number] = rounded(columns_of(scaled) * (scaled.factors - 1.0), dtype, site.name)
    return down, up


def _common_name(sites: Sequence[Site]) -> str:
    """What every site's name ends with, and no other module's: all that follows the layer's number."""
    first = sites[0]
    _, _, after = first.name.partition(f".{first.layer}.")
    assert all(site.name.endswith(f".{site.layer}.{after}") for site in sites), first.name
    return after


def _config(
    base: str, rank: int, ranks: dict[str, int], targets: Sequence[str], site: Site
) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": ranks,
        "alpha_pattern": ranks,
        "target_modules": list(targets),
        "fan_in_fan_out": input_dimension(site.module) == 0,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "modules_to_save": None,
    }
