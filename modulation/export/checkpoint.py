"""A level baked into a plain Hugging Face folder: column i of each output projection times its factor.

Knows transformers' folders. Knows nothing of how levels are chosen or of where folders go.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from modulation.errors import ExportError
from modulation.export.source import DTYPES, Scaled, Source, columns_of, rounded
from modulation.sites import input_dimension


def bake(source: Source, active: Sequence[Scaled], dtype: str) -> None:
    """Scale the columns of the model's projections in place, with all weights as `dtype`.

    Raises ExportError for a weight that is also another parameter, which would be scaled with it, and where a
    value is too large for `dtype`; the model is spoilt then.
    """
    _refuse_tied(source)
    kept = [(each, columns_of(each)) for each in active]
    source.model.to(DTYPES[dtype])  # type: ignore[arg-type]
    for each, columns in kept:
        weight = each.site.module.weight
        assert isinstance(weight, Tensor)
        scaled = rounded(columns * each.factors, DTYPES[dtype], each.site.name)
        across = input_dimension(each.site.module)
        with torch.no_grad():
            weight.index_copy_(across, each.columns, scaled.T if across == 0 else scaled)


def save(source: Source, folder: Path) -> None:
    """Write model, configuration, tokenizer and chat template into `folder`."""
    source.model.save_pretrained(folder)
    source.tokenizer.save_pretrained(folder)


def _refuse_tied(source: Source) -> None:
    names: dict[int, list[str]] = {}
    for name, parameter in source.model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter.data_ptr(), []).append(name)
    for site in source.sites:
        weight = site.module.weight
        assert isinstance(weight, Tensor)
        if len(shared := names[weight.data_ptr()]) > 1:
            raise ExportError(
                f"The weight {shared[0]} is tied to {shared[1]}: scaling one would scale the other. Export "
                "the level as an adapter (neurontune export lora)."
            )
