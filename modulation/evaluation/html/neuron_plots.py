"""The report's drawings of a mask: in which layers its neurons lie, and their factors.

Knows neuron sets. Knows nothing of evaluations or of the page around the drawings.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from modulation.evaluation.html.page import Html
from modulation.evaluation.html.plots import WIDTH, colour
from modulation.evaluation.html.svg import INK, inline_svg

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def layers(name: str, description: str, counts: Mapping[str, npt.NDArray[np.int64]]) -> Html:
    """How many neurons of each set lie in each layer, stacked. `counts` maps a set to its counts by layer."""

    def draw(drawing: "Figure") -> None:
        from matplotlib.ticker import MaxNLocator

        place = drawing.subplots()
        below = np.zeros(len(next(iter(counts.values()))), dtype=np.int64)
        for number, (kind, found) in enumerate(counts.items(), start=1):
            place.bar(np.arange(len(found)), found, 0.8, below, color=colour(number), label=kind)
            below = below + found
        for axis in (place.xaxis, place.yaxis):
            axis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        place.set_xlabel("layer, from 0")
        place.set_ylabel("neurons")
        place.grid(axis="x", visible=False)
        drawing.legend(loc="outside lower center", ncols=2)

    return inline_svg(name, "Neurons by layer", description, (WIDTH, 3.0), draw)


def factors(name: str, description: str, values: Mapping[str, npt.NDArray[np.float32]]) -> Html:
    """How many neurons of each set have which factor, stacked; a line stands where nothing is changed."""
    together = np.concatenate([*values.values(), np.ones(1, np.float32)]).astype(np.float64)
    spread = together.max() - together.min()
    edges = np.linspace(together.min(), together.max() + 1e-6, 41) if spread else np.array([0.9, 1.1])

    def draw(drawing: "Figure") -> None:
        from matplotlib.ticker import MaxNLocator

        place = drawing.subplots()
        below = np.zeros(len(edges) - 1)
        for number, (kind, found) in enumerate(values.items(), start=1):
            height, _ = np.histogram(found, edges)
            bar = {"align": "edge", "color": colour(number), "label": kind}
            place.bar(edges[:-1], height, np.diff(edges), below, **bar)  # type: ignore[arg-type]
            below = below + height
        place.axvline(1, color=INK, lw=1, ls="--", label="1 = untouched")
        place.yaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        place.set_xlabel("factor")
        place.set_ylabel("neurons")
        place.grid(axis="x", visible=False)
        drawing.legend(loc="outside lower center", ncols=3)

    return inline_svg(name, "Factors", description, (WIDTH, 2.8), draw)
