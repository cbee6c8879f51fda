"""A mask from ranked neurons: the draft that tuning fills with factors and the sweep with levels.

Knows models, masks and scores. Knows nothing of how either is found.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedModel

from modulation.attribution.base import Scores
from modulation.attribution.selection import candidates, ranked_sets
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


def candidate_neurons(
    scores: Scores, num_safety: int, num_utility: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Neurons to prune from, of whatever score. Raises DataError where a kind has too few."""
    safety, utility = candidates(scores, num_safety, num_utility)
    for kind, found, wanted in (("safety", safety, num_safety), ("utility", utility, num_utility)):
        if len(found) < wanted:
            raise DataError(
                f"There are {len(found)} neurons that rank better by {kind} than by the other score; option "
                f"prune_shares asks for {wanted} of them. Begin it with a smaller share."
            )
    return safety, utility


def first_neurons(
    scores: Scores, sizes: Sequence[Threshold]
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """The neurons that the first of `sizes` asks for: candidates where others follow, else the top ones.

    Raises DataError where there are too few.
    """
    find = candidate_neurons if len(sizes) > 1 else top_neurons
    return find(scores, sizes[0].num_safety, sizes[0].num_utility)


def untouched(mask: Mask) -> Mask:
    """The same neurons with factors of 1."""
    return replace(
        mask,
        safety=NeuronSet(mask.safety.neurons, np.ones(len(mask.safety), np.float32)),
        utility=NeuronSet(mask.utility.neurons, np.ones(len(mask.utility), np.float32)),
    )


def stage_sizes(model: PreTrainedModel, shares: Sequence[float], final: Threshold) -> tuple[Threshold, ...]:
    """How many neurons of each kind are learned in each stage: `shares` of all neurons, parted as `final`
    parts them, then `final` itself.

    Raises DataError for a share that leaves fewer neurons than `final`.
    """
    sites = find_sites(model)
    total = len(sites) * sites[0].width
    wanted = final.num_safety + final.num_utility
    sizes = []
    for share in shares:
        kept = int(share * total)
        if kept < wanted:
            raise DataError(
                f"Option prune_shares: a share of {share:g} is {kept} of {total} neurons, fewer than the "
                f"{wanted} that are wanted in the end. Leave it out, or ask for fewer neurons."
            )
        num_utility = kept * final.num_utility // wanted
        sizes.append(Threshold(kept - num_utility, num_utility))
    return (*sizes, final)


def counts(model: PreTrainedModel, share: float) -> tuple[int, int]:
    """How many neurons of each kind make up `share` of all neurons together, half and half."""
    sites = find_sites(model)
    total = len(sites) * sites[0].width
    active = int(share * total)
    if active < 2:
        raise DataError(f"A share of {share:g} is {active} of {total} neurons; at least 2 are needed.")
    return active - active // 2, active // 2
