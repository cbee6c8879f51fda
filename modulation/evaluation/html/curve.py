"""The report's part on what safety costs: the levels, and the sweep that the mask's levels were chosen from.

Knows figures and a mask's metadata. Knows nothing of how either came about.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from modulation.errors import MaskFormatError
from modulation.evaluation.html import plots
from modulation.evaluation.html.page import Html, element, figure, folded, section, table
from modulation.evaluation.metrics import Rate
from modulation.evaluation.quality import Figures
from modulation.evaluation.report import percent
from modulation.levels import OFF
from modulation.masks import Mask

Levels = Mapping[str, Figures]


class SweepPoint(NamedTuple):
    """A threshold that was tried when the mask was made; rates by metric, as far as they were measured."""

    threshold: tuple[int, int]
    rates: Mapping[str, float]


class Sweep(NamedTuple):
    """The mask's own safety-utility curve. `benign_at_off` is None where `off` was not measured; `named`
    are the thresholds of the mask's levels."""

    points: list[SweepPoint]
    benign_at_off: float | None
    named: dict[tuple[int, int], str]
    split: str


def curve_section(levels: Levels, mask: Mask | None) -> Html | None:
    """Attack success against over-refusal and benign loss; None where neither can be drawn."""
    sweep = read_sweep(mask) if mask is not None else None
    panels = [each for each in (_over_refusal(levels, sweep), _benign_loss(levels, sweep)) if each.levels]
    if not panels:
        return None
    told = "; ".join(
        f"{point.name}: {panel.label} {point.x.value:.1f}, attack success {point.y.value:.1f} %"
        for panel in panels
        for point in panel.levels
    )
    caption = (
        "Lower left is better. Bars are 95 % intervals; those of lost benign answers are the level's own, "
        "with off taken as known. The numbers stand in the summary's table."
    )
    shown = [figure(plots.curve("curve", f"{told}.", panels), caption)]
    if sweep is not None and sweep.points:
        shown.append(_sweep_table(sweep))
    return section("Safety and what it costs", *shown)


def read_sweep(mask: Mask) -> Sweep | None:
    """`evaluation["curve"]` of the mask's metadata, None where there is none. Raises MaskFormatError."""
    found = mask.metadata.evaluation
    if "curve" not in found:
        return None
    try:
        points = [_point(each) for each in found["curve"]]
        at_off = [point.rates for point in points if point.threshold == (0, 0)]
        off = at_off[0] if at_off else _rates(found.get("levels", {}).get(OFF, {}))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise MaskFormatError(
            "The mask's metadata field 'evaluation.curve' is not a list of objects with 'threshold', two "
            f"whole numbers, and 'metrics', rates by name ({error!r}). Make the mask's levels again."
        ) from error
    named = {(t.num_safety, t.num_utility): name for name, t in mask.levels.named.items()}
    return Sweep(points, off.get("benign_correct"), named, str(found.get("split", "not recorded")))


def _point(found: Any) -> SweepPoint:
    num_safety, num_utility = found["threshold"]
    return SweepPoint((int(num_safety), int(num_utility)), _rates(found["metrics"]))


def _rates(metrics: Any) -> dict[str, float]:
    wanted = ("asr", "over_refusal", "benign_correct")
    return {name: float(metrics[name]["rate"]) for name in wanted if name in metrics}


def _over_refusal(levels: Levels, sweep: Sweep | None) -> plots.Panel:
    points = [
        plots.CurvePoint(name, plots.Interval.of(each["over_refusal"]), plots.Interval.of(each["asr"]))
        for name, each in levels.items()
        if "over_refusal" in each and "asr" in each
    ]
    return _panel("over-refusal, %", points, sweep, lambda rates: rates.get("over_refusal"))


def _benign_loss(levels: Levels, sweep: Sweep | None) -> plots.Panel:
    label = "benign answers lost, points"
    off = levels.get(OFF, Figures())
    if "benign_correct" not in off:
        return plots.Panel(label, [])
    points = [
        plots.CurvePoint(
            name, _lost(off["benign_correct"], each["benign_correct"]), plots.Interval.of(each["asr"])
        )
        for name, each in levels.items()
        if "benign_correct" in each and "asr" in each
    ]
    at_off = sweep.benign_at_off if sweep else None

    def lost(rates: Mapping[str, float]) -> float | None:
        return None if at_off is None or "benign_correct" not in rates else at_off - rates["benign_correct"]

    return _panel(label, points, sweep, lost)


def _lost(off: Rate, level: Rate) -> plots.Interval:
    value, low, high = plots.Interval.of(level)
    reference = 100 * off["rate"]
    return plots.Interval(reference - value, reference - high, reference - low)


def _panel(
    label: str,
    points: list[plots.CurvePoint],
    sweep: Sweep | None,
    cost: Callable[[Mapping[str, float]], float | None],
) -> plots.Panel:
    tried, named = [], []
    for point in sweep.points if sweep else ():
        x = cost(point.rates)
        if x is not None and "asr" in point.rates:
            tried.append((100 * x, 100 * point.rates["asr"]))
            if sweep and point.threshold in sweep.named:
                named.append(tried[-1])
    return plots.Panel(label, points, tried, named)


def _sweep_table(sweep: Sweep) -> Html:
    rows = []
    for (num_safety, num_utility), rates in sweep.points:
        cells = [
            percent(rates[name]) if name in rates else "-"
            for name in ("asr", "over_refusal", "benign_correct")
        ]
        rows.append((f"{num_safety}, {num_utility}", sweep.named.get((num_safety, num_utility), ""), *cells))
    headings = ("safety, utility neurons", "level", "attack success", "over-refusal", "benign correct")
    note = (
        f"The sweep was measured when the mask was made, on other prompts (split: {sweep.split}), so that "
        "its points need not lie where the levels above do."
    )
    return folded("The mask's sweep as a table", element("p", note), table("Sweep", headings, rows))
