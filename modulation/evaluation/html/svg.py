"""A matplotlib figure as inline SVG that follows the page's colours, light or dark.

Knows matplotlib and SVG. Knows nothing of what is drawn. The same drawing gives the same text: no dates, no
random names, nothing from elsewhere.
"""

import io
import re
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Final

from modulation.errors import NeuronTuneError
from modulation.evaluation.html.page import Html, element

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK: Final = "#010203"
SOFT: Final = "#010204"
RULE: Final = "#010205"
SERIES: Final = ("#020300", "#020301", "#020302", "#020303", "#020304", "#020305")
_PAGE_COLOURS: Final = {
    INK: "var(--ink)",
    SOFT: "var(--soft)",
    RULE: "var(--rule)",
    **{colour: f"var(--series-{number})" for number, colour in enumerate(SERIES)},
}
"""Colours that stand for the page's own (report.css), which differ between light and dark."""

_SETTINGS: Final = {
    "svg.fonttype": "none",
    "svg.hashsalt": "neurontune",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Helvetica", "Arial", "sans-serif"],
    "font.size": 9.0,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 9.0,
    "axes.titlelocation": "left",
    "grid.linewidth": 0.6,
    "grid.color": RULE,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.edgecolor": SOFT,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
}

Draw = Callable[["Figure"], None]


def require_matplotlib() -> None:
    """Raise NeuronTuneError where plots cannot be drawn, before anything slow is done."""
    if find_spec("matplotlib") is None:
        raise NeuronTuneError(
            "The HTML report draws its plots with matplotlib, which is not installed. Install it with "
            "`pip install 'neurontune[evaluation]'`, or leave the report out."
        )


def inline_svg(name: str, title: str, description: str, size: tuple[float, float], draw: Draw) -> Html:
    """What `draw` draws, `size` inches, as `<svg>` with a title and a description for who cannot see it.

    `name` is the drawing's own on its page: letters, digits, hyphens.
    Raises NeuronTuneError without matplotlib.
    """
    require_matplotlib()
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    written = io.StringIO()
    with rc_context(_SETTINGS), _unknown_glyphs_allowed():  # type: ignore[arg-type]
        drawing = Figure(figsize=size, layout="constrained")
        FigureCanvasSVG(drawing)
        draw(drawing)
        drawing.savefig(written, format="svg", metadata={"Date": None})
    return _embedded(written.getvalue(), name, title, description)


def _unknown_glyphs_allowed() -> AbstractContextManager[object]:
    """Names in scripts that matplotlib's font lacks: the browser has the last word on fonts."""
    return warnings.catch_warnings(action="ignore", category=UserWarning)


def _embedded(svg: str, name: str, title: str, description: str) -> Html:
    """Matplotlib's file without declarations, metadata and names that nothing refers to."""
    box = re.search(r'viewBox="([^"]+)"', svg)
    assert box, svg[:500]
    body = svg[svg.index("<svg") : svg.rindex("</svg>")].split(">", 1)[1]
    body = re.sub(r"\s*<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r"<!--.*?-->\s*", "", body, flags=re.DOTALL)
    body = body.replace("xlink:href=", "href=")
    named = set(re.findall(r"#([A-Za-z_][\w.-]*)", body))
    body = re.sub(
        r' id="([^"]*)"', lambda found: f' id="{name}-{found[1]}"' if found[1] in named else "", body
    )
    body = re.sub(r'(href="|url\()#', rf"\1#{name}-", body)
    body = re.sub(r"#0[12]0[23]0\d", lambda found: _PAGE_COLOURS.get(found[0], found[0]), body)
    told = [element("title", title, id=f"{name}-title"), element("desc", description, id=f"{name}-desc")]
    opened = f'<svg viewBox="{box[1]}" role="img" aria-labelledby="{name}-title {name}-desc">'
    return Html(f"{opened}\n{''.join(told)}{body}</svg>")
