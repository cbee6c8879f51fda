"""The report's part on a mask: where its neurons are and what is done to them.

Knows masks. Knows nothing of the figures that an evaluation found.
"""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from modulation.evaluation.html.neuron_plots import factors, layers
from modulation.evaluation.html.page import Html, element, figure, folded, section, table
from modulation.evaluation.report import percent
from modulation.masks import Mask


def mask_section(mask: Mask) -> Html:
    """Neurons by layer, factors, and how many of them each level activates."""
    sets = {"safety": mask.safety, "utility": mask.utility}
    num_layers = mask.metadata.num_layers
    counts = {
        kind: np.bincount(each.neurons[:, 0], minlength=num_layers).astype(np.int64)
        for kind, each in sets.items()
    }
    values = {kind: each.factors for kind, each in sets.items()}
    return section(
        "Where the neurons are",
        _level_table(mask),
        figure(
            layers("layers", _layers_in_words(counts), counts),
            f"The mask's neurons by layer, of {mask.metadata.neurons_per_layer} in each.",
        ),
        folded("The same as a table", _layer_table(mask, counts)),
        figure(
            factors("factors", "How many neurons have which factor; the table below has the spread.", values),
            "What active neurons are multiplied by: under 1 suppresses, over 1 amplifies.",
        ),
        _factor_table(values),
    )


def _level_table(mask: Mask) -> Html:
    total = mask.metadata.num_layers * mask.metadata.neurons_per_layer
    rows = []
    for level in mask.levels:
        num_safety, num_utility = level.threshold.num_safety, level.threshold.num_utility
        share = f"{100 * (num_safety + num_utility) / total:.2f} %"
        rows.append((element("code", level.name), str(num_safety), str(num_utility), share))
    headings = ("level", "safety neurons", "utility neurons", "share of all")
    return table(f"Active neurons by level, of {total}", headings, rows)


def _layer_table(mask: Mask, counts: Mapping[str, npt.NDArray[np.int64]]) -> Html:
    rows = [
        (str(layer), *(str(each[layer]) for each in counts.values()))
        for layer in range(mask.metadata.num_layers)
    ]
    return table("Neurons by layer", ("layer", *counts), rows)


def _layers_in_words(counts: Mapping[str, npt.NDArray[np.int64]]) -> str:
    told = [
        f"the {kind} set has {found.sum()} neurons, most of them ({found.max()}) in layer {found.argmax()}"
        for kind, found in counts.items()
        if found.sum()
    ]
    return "Stacked bars: " + "; ".join(told or ["both sets are empty"]) + "."


def _factor_table(values: Mapping[str, npt.NDArray[np.float32]]) -> Html:
    rows = []
    for kind, found in values.items():
        if len(found):
            spread = [f"{each:.3g}" for each in np.quantile(found, (0, 0.25, 0.5, 0.75, 1))]
            changed = (percent(float((found < 1).mean())), percent(float((found > 1).mean())))
            rows.append((kind, str(len(found)), *spread, *changed))
    headings = (
        *("set", "neurons", "least", "first quartile", "median", "third quartile", "largest"),
        *("suppressed", "amplified"),
    )
    return table("Factors", headings, rows)
