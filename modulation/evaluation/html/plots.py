"""The report's drawings of rates: the safety-utility curve, attack families, pruning.

Knows figures and how they are best looked at. Knows nothing of the page around them; every number that is
drawn also stands in one of the page's tables.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from modulation.evaluation.html.page import Html, printable
from modulation.evaluation.html.svg import INK, SERIES, SOFT, inline_svg
from modulation.evaluation.metrics import Rate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH: Final = 7.4
PANELS_A_ROW: Final = 4
LONGEST_NAME: Final = 26
_MARKERS: Final = ("o", "s", "^", "D", "v", "P", "X")


class Interval(NamedTuple):
    """A value and its interval's ends, in per cent or points."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, rate: Rate) -> "Interval":
        return cls(100 * rate["rate"], 100 * rate["low"], 100 * rate["high"])


class CurvePoint(NamedTuple):
    """One level or sweep point: `x` over-refusal or benign loss, `y` attack success."""

    name: str
    x: Interval
    y: Interval


class Panel(NamedTuple):
    """One side of the safety-utility curve. `sweep` are (x, y) of other thresholds; `of_mask` those of them
    that are the mask's named levels."""

    label: str
    levels: Sequence[CurvePoint]
    sweep: Sequence[tuple[float, float]] = ()
    of_mask: Sequence[tuple[float, float]] = ()


class Line(NamedTuple):
    """Attack success over the number of pruned neurons."""

    name: str
    is_control: bool
    counts: Sequence[int]
    values: Sequence[Interval]


def curve(name: str, description: str, panels: Sequence[Panel]) -> Html:
    """Attack success against what it costs: lower left is better. One panel a kind of cost."""

    def draw(drawing: "Figure") -> None:
        axes = drawing.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for place, panel in zip(axes, panels, strict=True):
            _draw_panel(place, panel)
        axes[0].set_ylabel("attack success, %")
        handles: dict[str, Any] = {}
        for place in axes:
            handles |= {label: each for each, label in zip(*place.get_legend_handles_labels(), strict=True)}
        drawing.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3)

    return inline_svg(name, "Safety-utility curve", description, (WIDTH, 3.9), draw)


def _draw_panel(place: "Axes", panel: Panel) -> None:
    if panel.sweep:
        x, y = zip(*panel.sweep, strict=True)
        place.plot(x, y, ls="", marker=".", ms=5, color=SOFT, label="the mask's sweep")
        x, y = zip(*front(panel.sweep), strict=True)
        place.plot(x, y, drawstyle="steps-post", lw=1, color=SOFT, label="best of the sweep")
    if panel.of_mask:
        x, y = zip(*panel.of_mask, strict=True)
        place.plot(x, y, ls="", marker="o", ms=10, mfc="none", mec=SOFT, label="named levels in the sweep")
    for number, point in enumerate(panel.levels):
        ends = {"xerr": _ends(point.x), "yerr": _ends(point.y), "elinewidth": 1}
        style = {**_style(number), "ls": "", "ms": 7, "label": shortened(point.name)}
        place.errorbar(point.x.value, point.y.value, **ends, **style)  # type: ignore[arg-type]
    place.set_xlabel(panel.label)
    place.set_xlim(left=min(0.0, place.get_xlim()[0]))
    place.set_ylim(0, min(102, place.get_ylim()[1]))


def front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other beats in both coordinates, by x; lower is better in both."""
    best: list[tuple[float, float]] = []
    for point in sorted(set(points)):
        if not best or point[1] < best[-1][1]:
            best.append(point)
    return best


def families(name: str, description: str, rates: Mapping[str, Mapping[str, Rate]]) -> Html:
    """Attack success by family, one panel a level. `rates` maps a level to its rates by family."""
    rows = list(dict.fromkeys(family for found in rates.values() for family in found))
    per_row = min(PANELS_A_ROW, len(rates))
    num_rows = -(-len(rates) // per_row)

    def draw(drawing: "Figure") -> None:
        grid = drawing.subplots(num_rows, per_row, sharey=True, squeeze=False).ravel()
        first = next(iter(rates.values()))
        for number, (level, found) in enumerate(rates.items()):
            _draw_families(grid[number], level, number, rows, found, first)
        for place in grid[len(rates) :]:
            place.set_visible(False)
        grid[0].set_yticks(range(len(rows)), [shortened(row) for row in rows])
        grid[0].invert_yaxis()
        drawing.supxlabel("attack success, %", fontsize="medium")

    height = num_rows * (0.6 + 0.24 * len(rows)) + 0.3
    return inline_svg(name, "Attack success by attack family", description, (WIDTH, height), draw)


def _draw_families(
    place: "Axes",
    level: str,
    number: int,
    rows: Sequence[str],
    found: Mapping[str, Rate],
    first: Mapping[str, Rate],
) -> None:
    for row, family in enumerate(rows):
        if family in found:
            seen = Interval.of(found[family])
            place.barh(row, seen.value, height=0.66, color=colour(number), alpha=0.75)
            place.errorbar(seen.value, row, xerr=_ends(seen), color=INK, elinewidth=0.9, capsize=0)
        if number and family in first:
            place.plot([100 * first[family]["rate"]] * 2, [row - 0.42, row + 0.42], color=SOFT, lw=1.5)
    place.set_title(shortened(level))
    place.set_xlim(0, 100)
    place.tick_params(axis="y", length=0)
    place.grid(axis="y", visible=False)


def pruning(name: str, description: str, lines: Sequence[Line]) -> Html:
    """Attack success as neurons are pruned: one colour a level, controls dashed."""
    levels = list(dict.fromkeys(line.name for line in lines))

    def draw(drawing: "Figure") -> None:
        from matplotlib.ticker import MaxNLocator

        place = drawing.subplots()
        seen: set[tuple[str, bool]] = set()
        for line in lines:
            style = _style(levels.index(line.name))
            label = f"{shortened(line.name)}, {'random neurons' if line.is_control else 'safety neurons'}"
            y = [each.value for each in line.values]
            place.plot(
                line.counts, y, **style, ms=5, lw=1.5, ls=":" if line.is_control else "-",
                mfc="none" if line.is_control else style["color"],
                label=None if (line.name, line.is_control) in seen else label,
            )  # fmt: skip
            seen.add((line.name, line.is_control))
            if not line.is_control:
                low, high = [each.low for each in line.values], [each.high for each in line.values]
                place.fill_between(line.counts, low, high, color=style["color"], alpha=0.15, lw=0)
        place.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        place.set_ylim(0, 100)
        place.set_xlabel("neurons pruned")
        place.set_ylabel("attack success, %")
        drawing.legend(loc="outside lower center", ncols=2)

    return inline_svg(name, "Attack success as neurons are pruned", description, (WIDTH, 4.0), draw)


def shortened(text: str) -> str:
    """A name for a drawing; the tables have it whole."""
    shown = printable(text).strip() or "(no name)"
    return shown if len(shown) <= LONGEST_NAME else shown[: LONGEST_NAME - 1] + "\N{HORIZONTAL ELLIPSIS}"


def colour(number: int) -> str:
    return SERIES[number % len(SERIES)]


def _style(number: int) -> dict[str, Any]:
    return {"color": colour(number), "marker": _MARKERS[number % len(_MARKERS)]}


def _ends(seen: Interval) -> list[list[float]]:
    return [[max(0.0, seen.value - seen.low)], [max(0.0, seen.high - seen.value)]]
