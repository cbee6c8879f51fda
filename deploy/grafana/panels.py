"""The panels that our dashboards are made of, and what all dashboards share: variables, links, refresh.

Knows Grafana's SDK. Knows no metric: expressions come as text.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from string import ascii_uppercase
from typing import Any, Final

from grafana_foundation_sdk.builders import common as common_builders
from grafana_foundation_sdk.builders import heatmap, stat, table, timeseries
from grafana_foundation_sdk.builders.dashboard import (
    CustomVariable,
    Dashboard,
    DashboardLink,
    DatasourceVariable,
    QueryVariable,
    Row,
    ThresholdsConfig,
)
from grafana_foundation_sdk.builders.prometheus import Dataquery
from grafana_foundation_sdk.models import common
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models.heatmap import HeatmapColorMode
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

from deploy.grafana.series import RANGE

TAG: Final = "neurontune"
DATASOURCE: Final = models.DataSourceRef(type_val="prometheus", uid="${datasource}")
WIDTH: Final = 24
METRIC: Final = re.compile(r"\b(?:neurontune_\w+|\w+:neurontune_\w+:\w+|up)(?=\{)")

Panel = Any  # the SDK's builders of panels share methods, but no class


@dataclass(frozen=True)
class Query:
    """One expression of a panel, and how its series are called: `{{label}}` stands for a label's value."""

    expr: str
    legend: str = ""


def tile(
    title: str,
    unit: str,
    query: str,
    about: str,
    *,
    width: int = 3,
    color: str = "green",
    steps: Sequence[tuple[float, str]] = (),
) -> Panel:
    """One number. `steps` are values from which on it has another colour."""
    panel = stat.Panel().graph_mode(common.BigValueGraphMode.AREA).color_mode(common.BigValueColorMode.VALUE)
    panel = panel.reduce_options(common_builders.ReduceDataOptions().calcs(["lastNotNull"]))
    panel = _panel(panel, title, unit, about, [Query(query)], width, height=4)
    return panel.thresholds(_steps(steps, color))


def lines(title: str, unit: str, about: str, *queries: Query, width: int = 8, stacked: bool = False) -> Panel:
    """Values over time."""
    legend = common_builders.VizLegendOptions().show_legend(True).placement(common.LegendPlacement.BOTTOM)
    legend = legend.display_mode(common.LegendDisplayMode.TABLE).calcs(["mean", "max", "lastNotNull"])
    tooltip = common_builders.VizTooltipOptions().mode(common.TooltipDisplayMode.MULTI)
    panel = timeseries.Panel().legend(legend).tooltip(tooltip.sort(common.SortOrder.DESCENDING))
    panel = panel.fill_opacity(30 if stacked else 8).show_points(common.VisibilityMode.NEVER).min(0)
    if stacked:
        mode = common.StackingMode.PERCENT if unit == "percentunit" else common.StackingMode.NORMAL
        panel = panel.stacking(common_builders.StackingConfig().mode(mode).group("A"))
    return _panel(panel, title, unit, about, queries, width=width, height=8)


def marked(panel: Panel, *steps: tuple[float, str]) -> Panel:
    """Lines with a dashed line of another colour at each step."""
    style = common_builders.GraphThresholdsStyleConfig().mode(common.GraphThresholdsStyleMode.DASHED)
    return panel.thresholds_style(style).thresholds(_steps(steps))


def heat(title: str, unit: str, about: str, buckets: str, *, width: int = 8) -> Panel:
    """How observations were distributed over a histogram's buckets, over time."""
    panel = heatmap.Panel().calculate(False).cell_gap(1).y_axis(heatmap.YAxisConfig().unit(unit))
    panel = panel.color(heatmap.HeatmapColorOptions().mode(HeatmapColorMode.SCHEME).scheme("Turbo").steps(64))
    query = Query(buckets, "{{le}}")
    return _panel(panel, title, unit, about, [query], width, 8, form=PromQueryFormat.HEATMAP)


def grid(title: str, about: str, columns: dict[str, tuple[str, str]], hidden: Sequence[str] = ()) -> Panel:
    """A table of what is now, joined by labels. `columns` are name: (expression, unit)."""
    queries = [Query(expr) for expr, _ in columns.values()]
    panel = table.Panel().with_transformation(models.DataTransformerConfig("merge", options={}))
    values = {f"Value #{letter}": name for letter, name in zip(ascii_uppercase, columns, strict=False)}
    if len(columns) == 1:
        values = {"Value": next(iter(columns))}
    options = {"excludeByName": dict.fromkeys(("Time", *hidden), True), "renameByName": values}
    panel = panel.with_transformation(models.DataTransformerConfig("organize", options=options))
    for name, (_, unit) in columns.items():
        panel = panel.override_by_name(name, [models.DynamicConfigValue("unit", unit)])
    form = PromQueryFormat.TABLE
    return _panel(panel, title, "short", about, queries, width=WIDTH, height=7, form=form)


def dashboard(
    uid: str, title: str, about: str, rows: dict[str, Sequence[Panel]], variables: Sequence[Any], present: str
) -> models.Dashboard:
    """A dashboard of rows of panels; those of the row named "" stand on top. `present` is a metric that every
    server and model has: from it come the choices.

    Raises:
        ValueError: the panels of a row do not fill its lines.
    """
    builder = Dashboard(title).uid(uid).description(about).tags([TAG]).refresh("30s").time("now-1h", "now")
    builder = builder.editable().tooltip(models.DashboardCursorSync.CROSSHAIR)
    # Other dashboards of the tag, at the same time and with the same choices.
    link = (
        DashboardLink("NeuronTune").type(models.DashboardLinkType.DASHBOARDS).tags([TAG]).as_dropdown(False)
    )
    builder = builder.link(link.keep_time(True).include_vars(True))
    for variable in (*_choices(present), *variables):
        builder = builder.with_variable(variable)
    numbers = count(1)
    for name, panels in rows.items():
        if name:
            builder = builder.with_row(Row(name).id(next(numbers)))
        for panel in _whole_lines(name, panels):
            builder = builder.with_panel(panel.id(next(numbers)))
    return builder.build()


def choice(name: str, label: str, about: str, values: dict[str, str], chosen: str) -> CustomVariable:
    """A variable with these values, by what is shown for each."""
    options = [models.VariableOption(text=text, value=value) for text, value in values.items()]
    (current,) = [option for option in options if option.value == chosen]
    current = models.VariableOption(selected=True, text=current.text, value=current.value)
    written = ", ".join(f"{text} : {value}" for text, value in values.items())
    variable = CustomVariable(name).label(label).description(about).values(written).options(options)
    return variable.current(current).allow_custom_value(False)


def _choices(present: str) -> Iterator[Any]:
    """Where the metrics come from, and whose are shown."""
    yield DatasourceVariable("datasource").label("Data source").type("prometheus")
    within = 'job=~"$job",namespace=~"$namespace"'
    chosen = f'{within},model_name=~"$model_name"'
    for name, label, query in (
        ("job", "Job", f"label_values({present}, job)"),
        ("namespace", "Namespace", f'label_values({present}{{job=~"$job"}}, namespace)'),
        ("model_name", "Model", f"label_values({present}{{{within}}}, model_name)"),
        ("instance", "Server", f"label_values({present}{{{chosen}}}, instance)"),
    ):
        variable = QueryVariable(name).label(label).query(query).datasource(DATASOURCE).multi(True)
        variable = variable.include_all(True).sort(models.VariableSort.ALPHABETICAL_ASC)
        if name != "job":  # of jobs, all means all of ours: `up` has others
            variable = variable.all_value(".*")
        everything = models.VariableOption(selected=True, text=["All"], value=["$__all"])
        yield variable.refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED).current(everything)


def _panel(
    panel: Panel,
    title: str,
    unit: str,
    about: str,
    queries: Sequence[Query],
    width: int,
    height: int,
    form: PromQueryFormat = PromQueryFormat.TIME_SERIES,
) -> Panel:
    names = dict.fromkeys(name for query in queries for name in METRIC.findall(query.expr))
    about = f"{about} From {', '.join(f'`{name}`' for name in names)}."
    panel = panel.title(title).description(about).datasource(DATASOURCE).unit(unit).span(width).height(height)
    for letter, query in zip(ascii_uppercase, queries, strict=False):
        target = Dataquery().expr(query.expr).ref_id(letter).datasource(DATASOURCE).format(form)
        # Of what looks at all the time that is shown, the last value is enough.
        is_instant = form is PromQueryFormat.TABLE or RANGE in query.expr
        target = target.instant() if is_instant else target.range()
        panel = panel.with_target(target.legend_format(query.legend or "__auto"))
    return panel


def _steps(steps: Sequence[tuple[float, str]], below: str = "green") -> ThresholdsConfig:
    levels = [models.Threshold(value=None, color=below)]
    levels += [models.Threshold(value=value, color=color) for value, color in steps]
    return ThresholdsConfig().mode(models.ThresholdsMode.ABSOLUTE).steps(levels)


def _whole_lines(name: str, panels: Sequence[Panel]) -> Sequence[Panel]:
    at, height = 0, 0
    for place in (panel.build().grid_pos for panel in panels):
        if (at and place.h != height) or at + place.w > WIDTH:
            raise ValueError(f"The panels of the row {name!r} leave a gap: they fill no lines of {WIDTH}.")
        at, height = (at + place.w) % WIDTH, place.h
    if at:
        raise ValueError(f"The last line of the row {name!r} is {at} of {WIDTH} wide.")
    return panels
