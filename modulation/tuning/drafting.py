"""A mask from ranked neurons: the draft that tuning fills with factors and the sweep with levels.

Knows models, masks and scores. Knows nothing of how either is found.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedModel

from modulation.attribution.base import Scores
from modulation.attribution.selection import ranked_sets
from modulation.errors import DataError
from modulation.fingerprints import fingerprint
from modulation.levels import SECURITY_CRITICAL, Threshold
from modulation.masks import Mask, MaskMetadata, NeuronSet
from modulation.sites import find_sites


def draft(
    model: PreTrainedModel,
    model_id: str,
    safety: npt.NDArray[np.int32],
    utility: npt.NDArray[np.int32],
    *,
    factors: tuple[float, float] = (1.0, 1.0),
    levels: Mapping[str, Threshold] | None = None,
    **metadata: Any,
) -> Mask:
    """A mask of these ranked neurons, int32 (n, 2) of (layer, index), with one factor a set.

    Without levels there is only `security-critical`, all neurons. `metadata` are fields of MaskMetadata.
    """
    sites = find_sites(model)
    named = levels or {SECURITY_CRITICAL: Threshold(len(safety), len(utility))}
    return Mask(
        safety=NeuronSet(safety, np.full(len(safety), factors[0], np.float32)),
        utility=NeuronSet(utility, np.full(len(utility), factors[1], np.float32)),
        metadata=MaskMetadata(
            model_id=model_id,
            architecture=type(model).__name__,
            model_fingerprint=fingerprint(model),
            num_layers=len(sites),
            neurons_per_layer=sites[0].width,
            levels={name: (each.num_safety, each.num_utility) for name, each in named.items()},
            **metadata,
        ),
    )


def top_neurons(
    scores: Scores, num_safety: int, num_utility: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """The top neurons of both kinds. Raises DataError where too few have a positive score."""
    safety, utility = ranked_sets(scores, num_safety, num_utility)
    for kind, found, wanted in (("safety", safety, num_safety), ("utility", utility, num_utility)):
        if len(found) < wanted:
            raise DataError(
                f"The scores make {len(found)} {kind} neurons, {wanted} were asked for: only neurons of "
                "positive score count. Ask for fewer, or attribute with other options."
            )
    return safety, utility


def counts(model: PreTrainedModel, share: float) -> tuple[int, int]:
    """How many neurons of each kind make up `share` of all neurons together, half and half."""
    sites = find_sites(model)
    total = len(sites) * sites[0].width
    active = int(share * total)
    if active < 2:
        raise DataError(f"A share of {share:g} is {active} of {total} neurons; at least 2 are needed.")
    return active - active // 2, active // 2
