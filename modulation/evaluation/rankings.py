"""Which neurons are pruned first, and how many at a time.

Knows masks and scores. Knows nothing of models or of what pruning does to them.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from modulation.attribution.scores import ScoresFile
from modulation.errors import DataError, ScoresError
from modulation.masks import Mask

SAFETY: Final = "safety"

Neurons = npt.NDArray[np.int32]
"""Ranked neurons, (n, 2) of (layer, index): the first ones are pruned first."""


@dataclass(frozen=True)
class Pruning:
    """The first neurons of a ranking are pruned, as many as each of `counts` says; 0 prunes nothing.

    Raises DataError for a count beyond the ranking's end.
    """

    name: str
    ranking: Neurons
    counts: tuple[int, ...]

    def __post_init__(self) -> None:
        for count in self.counts:
            if not 0 <= count <= len(self.ranking):
                raise DataError(
                    f"{count} neurons cannot be pruned: the ranking {self.name!r} holds {len(self.ranking)}; "
                    f"accepted: 0 to {len(self.ranking)}. {self._way_out()}"
                )

    def _way_out(self) -> str:
        if self.name == SAFETY:
            return "A scores file (--scores) ranks the neurons beyond the mask's safety set too."
        return "Prune fewer, or leave the control out (--num-random 0)."


def safety_pruning(mask: Mask, counts: tuple[int, ...], scores: ScoresFile | None = None) -> Pruning:
    """The attack: the top neurons of the mask's safety set. With scores, the neurons outside both sets
    follow, highest safety score first, so that more than the set can be pruned.

    Raises DataError for a count too large, and ScoresError for scores of another model.
    """
    if scores is None:
        return Pruning(SAFETY, mask.safety.neurons, counts)
    _refuse_other_model(mask, scores)
    others = _outside(mask, mask.safety.neurons)
    following = others[np.argsort(-scores.safety.astype(np.float64).ravel()[others], kind="stable")]
    return Pruning(SAFETY, np.concatenate([mask.safety.neurons, _positions(mask, following)]), counts)


def random_pruning(mask: Mask, attack: Pruning, seed: int) -> Pruning:
    """The control: as many neurons as the attack prunes at most, each drawn by the seed from the layer of
    the attacked neuron of its rank, so that layers do not explain a difference; none of the mask's own, and
    none that is attacked. Only nothing and the most is pruned: fewer random neurons do less.

    Raises DataError where too few neurons are left.
    """
    most = max(attack.counts)
    attacked = attack.ranking[:most]
    drawn = np.random.default_rng(seed).permutation(_outside(mask, attacked)).tolist()
    by_layer: dict[int, list[int]] = {}
    for neuron in reversed(drawn):
        by_layer.setdefault(neuron // mask.metadata.neurons_per_layer, []).append(neuron)
    matched = [by_layer[layer].pop() for layer in attacked[:, 0].tolist() if by_layer.get(layer)]
    taken = set(matched)
    ranked = np.array([*matched, *(each for each in drawn if each not in taken)], np.int64)
    counts = tuple(count for count in attack.counts if count in (0, most))
    return Pruning(f"random {seed}", _positions(mask, ranked), counts)


def read_counts(text: str, size: int) -> tuple[int, ...]:
    """Counts separated by commas, in ascending order, each once: whole numbers of neurons, or shares of the
    safety set of `size` neurons such as `25%`, rounded up. Raises DataError."""
    return tuple(sorted({_read_count(each.strip(), size) for each in text.split(",")}))


def _refuse_other_model(mask: Mask, scores: ScoresFile) -> None:
    """The mask is checked against the model; what fits the mask fits the model."""
    for name in ("architecture", "num_layers", "neurons_per_layer", "model_fingerprint"):
        has, needs = getattr(scores.metadata, name), getattr(mask.metadata, name)
        if has != needs:
            raise ScoresError(
                f"The scores (--scores) are of another model than the mask: their {name} is {has!r}, the "
                f"mask's is {needs!r}. Attribute the mask's model ({mask.metadata.model_id}) again."
            )


def _outside(mask: Mask, more: Neurons) -> npt.NDArray[np.int64]:
    """Flat indices of the neurons in neither set of the mask, nor in `more`."""
    width = mask.metadata.neurons_per_layer
    members = np.concatenate([mask.safety.neurons, mask.utility.neurons, more]).astype(np.int64)
    return np.setdiff1d(np.arange(mask.metadata.num_layers * width), members[:, 0] * width + members[:, 1])


def _positions(mask: Mask, flat: npt.NDArray[np.int64]) -> Neurons:
    width = mask.metadata.neurons_per_layer
    return np.stack([flat // width, flat % width], axis=1).astype(np.int32)


def _read_count(text: str, size: int) -> int:
    digits = text.removesuffix("%")
    if not (digits.isascii() and digits.isdigit() and len(digits) < 10):
        raise DataError(
            f"Count {text!r} of pruned neurons is not understood; accepted: whole numbers of neurons and "
            "shares of the safety set such as 25%, separated by commas."
        )
    return -(-int(digits) * size // 100) if text.endswith("%") else int(digits)
