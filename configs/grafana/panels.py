"""What the dashboards are made of. An expression's `@` is the choice of cluster, `@class` that and
the choice of classes of card: every panel asks only for what was chosen at the top.

Units are Grafana's names; each panel has one, and says in a line what it shows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

from grafana_foundation_sdk.builders import common as build_common
from grafana_foundation_sdk.builders import dashboard as build
from grafana_foundation_sdk.builders import stat, statetimeline, table, timeseries
from grafana_foundation_sdk.builders.prometheus import Dataquery
from grafana_foundation_sdk.models import common, dashboard
from grafana_foundation_sdk.models.dashboard import DataSourceRef
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

SOURCE: Final = DataSourceRef(type_val="prometheus", uid="${datasource}")
_SITE: Final = 'cluster=~"$cluster"'
_CLASS: Final = f'{_SITE}, gpu_name=~"$class"'

CNX: Final = "suffix: CNX"
BYTES: Final = "bytes"
BYTES_A_SECOND: Final = "binBps"
CELSIUS: Final = "celsius"
COUNT: Final = "short"
PER_HOUR: Final = "suffix: /h"
PER_SECOND: Final = "suffix: /s"
SECONDS: Final = "s"
SHARE: Final = "percentunit"

GREEN, YELLOW, ORANGE, RED, BLUE = "green", "yellow", "orange", "red", "blue"
Steps = Sequence[tuple[float | None, str]]
"""From which value on a colour holds; the first from None on."""
PLAIN: Final[Steps] = ((None, BLUE),)
NONE_IS_GOOD: Final[Steps] = ((None, GREEN), (1, RED))
FEW_IS_GOOD: Final[Steps] = ((None, GREEN), (1, ORANGE))
SOME_IS_GOOD: Final[Steps] = ((None, RED), (1, GREEN))
YES_IS_GOOD: Final = {"0": ("no", RED), "1": ("yes", GREEN)}

PanelBuilder = timeseries.Panel | stat.Panel | table.Panel | statetimeline.Panel


def expand(expression: str) -> str:
    return expression.replace("@class", _CLASS).replace("@", _SITE)


def rate(counter: str, where: str = "@") -> str:
    """A second, of each series."""
    return f"rate({counter}{{{where}}}[$__rate_interval])"


def hourly(label: str, counter: str, where: str = "@") -> str:
    """An hour, by the label."""
    return f"sum by ({label}) ({rate(counter, where)}) * 3600"


def quantile(share: float, histogram: str, by: str = "le", where: str = "@") -> str:
    return f"histogram_quantile({share}, sum by ({by}) ({rate(f'{histogram}_bucket', where)}))"


def of_journals(label: str, gauge: str, where: str = "@") -> str:
    """The sum by the label of what each coordinator reads in its journal. Those of one identity,
    of which one acts and others stand by, share a journal, and are counted once."""
    with_identity = (
        f"{gauge}{{{where}}} "
        "* on (cluster, job, instance) group_left (identity) crynux_identity_info{@}"
    )
    return f"sum by ({label}) (max by (identity, {label}) ({with_identity}))"


@dataclass(frozen=True, slots=True)
class Query:
    expression: str
    legend: str = ""

    def build(self, ref: str, instant: bool = False, as_table: bool = False) -> Dataquery:
        made = Dataquery().expr(expand(self.expression)).ref_id(ref).datasource(SOURCE)
        made = made.legend_format(self.legend or "__auto")
        made = made.instant() if instant else made.range()
        shape = PromQueryFormat.TABLE if as_table else PromQueryFormat.TIME_SERIES
        return made.format(shape)


def _steps(steps: Steps) -> build.ThresholdsConfig:
    made = [dashboard.Threshold(value=value, color=colour) for value, colour in steps]
    return build.ThresholdsConfig().mode(dashboard.ThresholdsMode.ABSOLUTE).steps(made)


def _mapping(words: dict[str, tuple[str, str]]) -> list[dashboard.ValueMapping]:
    results = {
        value: dashboard.ValueMappingResult(text=text, color=colour, index=index)
        for index, (value, (text, colour)) in enumerate(words.items())
    }
    return [dashboard.ValueMap(options=results)]


def number(
    title: str,
    expression: str,
    about: str,
    *,
    unit: str = COUNT,
    steps: Steps = PLAIN,
    words: dict[str, tuple[str, str]] | None = None,
    span: int = 3,
    decimals: int | None = None,
    legend: str = "",
) -> stat.Panel:
    """The present value, large; with a `legend` its label's text instead."""
    by_name = common.BigValueTextMode.NAME if legend else common.BigValueTextMode.VALUE
    made = (
        stat.Panel()
        .title(title)
        .description(about)
        .datasource(SOURCE)
        .unit(unit)
        .span(span)
        .height(4)
        .thresholds(_steps(steps))
        .color_scheme(build.FieldColor().mode(dashboard.FieldColorModeId.THRESHOLDS))
        .color_mode(common.BigValueColorMode.VALUE)
        .graph_mode(common.BigValueGraphMode.NONE)
        .text_mode(by_name)
        .reduce_options(build_common.ReduceDataOptions().calcs(["lastNotNull"]))
        .mappings(_mapping(words or {}))
        .with_target(Query(expression, legend).build("A", instant=True))
    )
    return made if decimals is None else made.decimals(decimals)


@dataclass(frozen=True, slots=True)
class Look:
    """How lines are drawn. `limits` are drawn too, as lines."""

    stacked: Literal["no", "normal", "percent"] = "no"
    least: float | None = 0
    most: float | None = None
    limits: Steps = ()
    bars: bool = False


STACKED: Final = Look(stacked="normal")
PARTS: Final = Look(stacked="percent")


def lines(
    title: str,
    queries: Sequence[Query],
    about: str,
    *,
    unit: str,
    look: Look = Look(),  # noqa: B008 - frozen
    span: int = 8,
) -> timeseries.Panel:
    legend = (
        build_common.VizLegendOptions()
        .display_mode(common.LegendDisplayMode.TABLE)
        .placement(common.LegendPlacement.BOTTOM)
        .show_legend(True)
        .calcs(["mean", "lastNotNull"])
    )
    several = build_common.VizTooltipOptions().mode(common.TooltipDisplayMode.MULTI)
    made = (
        timeseries.Panel()
        .title(title)
        .description(about)
        .datasource(SOURCE)
        .unit(unit)
        .span(span)
        .height(9)
        .legend(legend)
        .tooltip(several.sort(common.SortOrder.DESCENDING))
        .stacking(build_common.StackingConfig().mode(_STACKING[look.stacked]))
        .fill_opacity(10 if look.stacked == "no" else 40)
        .show_points(common.VisibilityMode.NEVER)
        .thresholds(_steps(look.limits or PLAIN))
    )
    if look.bars:
        made.draw_style(common.GraphDrawStyle.BARS).fill_opacity(60)
    if look.least is not None:
        made.min(look.least)
    if look.most is not None:
        made.max(look.most)
    if look.limits:
        dashed = common.GraphThresholdsStyleMode.DASHED
        made.thresholds_style(build_common.GraphThresholdsStyleConfig().mode(dashed))
    for ref, query in zip("ABCDEFGH", queries, strict=False):
        made.with_target(query.build(ref))
    return made


_STACKING: Final = {
    "no": common.StackingMode.NONE,
    "normal": common.StackingMode.NORMAL,
    "percent": common.StackingMode.PERCENT,
}


def rows_of(
    title: str,
    expression: str,
    about: str,
    *,
    columns: dict[str, str],
    link: tuple[str, str, str] | None = None,
    span: int = 24,
) -> table.Panel:
    """A table of an expression's labels: `columns` by label, in order. `link` is a column's title,
    the link's, and its URL."""
    order = {label: place for place, label in enumerate(columns)}
    hidden = dict.fromkeys(("Time", "Value", "job", "instance", "cluster", "__name__"), True)
    tidy = {"excludeByName": hidden, "indexByName": order, "renameByName": columns}
    made = (
        table.Panel()
        .title(title)
        .description(about)
        .datasource(SOURCE)
        .unit("string")
        .span(span)
        .height(9)
        .filterable(True)
        .with_target(Query(expression).build("A", instant=True, as_table=True))
        .with_transformation(dashboard.DataTransformerConfig(id_val="organize", options=tidy))
    )
    if link is not None:
        column, text, url = link
        links = [{"title": text, "url": url}]
        made.override_by_name(column, [dashboard.DynamicConfigValue(id_val="links", value=links)])
    return made


def yes_and_no(
    title: str, query: Query, about: str, *, colour: str = GREEN, span: int = 12
) -> statetimeline.Panel:
    """A band for each series, coloured while it is 1."""
    return (
        statetimeline.Panel()
        .title(title)
        .description(about)
        .datasource(SOURCE)
        .unit(COUNT)
        .span(span)
        .height(9)
        .show_value(common.VisibilityMode.NEVER)
        .mappings(_mapping({"0": ("no", "transparent"), "1": ("yes", colour)}))
        .with_target(query.build("A"))
    )


@dataclass(frozen=True, slots=True)
class Section:
    title: str
    panels: Sequence[PanelBuilder]
    folded: bool = False


@dataclass(frozen=True, slots=True)
class Page:
    """A dashboard: `uid` is what links and provisioning know it by."""

    uid: str
    title: str
    about: str
    sections: Sequence[Section]
    variables: Sequence[build.QueryVariable] = field(default_factory=tuple)
    since: str = "now-6h"


def choice(
    name: str, label: str, query: str, *, about: str, every: bool = True
) -> build.QueryVariable:
    """A variable whose values Prometheus tells; `every` allows several of them, and all."""
    made = (
        build.QueryVariable(name)
        .label(label)
        .description(about)
        .datasource(SOURCE)
        .query({"query": query, "refId": name})
        .refresh(dashboard.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(dashboard.VariableSort.ALPHABETICAL_ASC)
    )
    if not every:
        return made
    everything = dashboard.VariableOption(selected=True, text=["All"], value=["$__all"])
    # .* is also what has no such label.
    return made.multi(True).include_all(True).all_value(".*").current(everything)


def _marks(name: str, expression: str, colour: str) -> build.AnnotationQuery:
    return (
        build.AnnotationQuery()
        .name(name)
        .datasource(SOURCE)
        .enable(True)
        .hide(False)
        .icon_color(colour)
        .expr(expand(expression))
    )


def make(page: Page) -> dashboard.Dashboard:
    others = (
        build.DashboardLink("crynux-cluster")
        .type(dashboard.DashboardLinkType.DASHBOARDS)
        .tags(["crynux-cluster"])
        .include_vars(True)
        .keep_time(True)
    )
    cluster = choice(
        "cluster",
        "Cluster",
        "label_values(crynux_build_info, cluster)",
        about="The targets' label; without one all are shown.",
    )
    made = (
        build.Dashboard(page.title)
        .uid(page.uid)
        .description(page.about)
        .tags(["crynux-cluster"])
        .refresh("30s")
        .time(page.since, "now")
        .timezone("browser")
        .editable()
        .tooltip(dashboard.DashboardCursorSync.CROSSHAIR)
        .link(others)
        .annotation(_marks("alerts", 'ALERTS{@, alertname=~"Crynux.*", alertstate="firing"}', RED))
        .annotation(
            _marks("restarts", "changes(crynux_process_start_time_seconds{@}[1m]) > 0", BLUE)
        )
        .with_variable(build.DatasourceVariable("datasource").label("Source").type("prometheus"))
        .with_variable(cluster)
    )
    for variable in page.variables:
        made.with_variable(variable)
    for section in page.sections:
        row = build.Row(section.title).collapsed(section.folded)
        if section.folded:
            for panel in section.panels:
                row.with_panel(panel)
        made.with_row(row)
        if not section.folded:
            for panel in section.panels:
                made.with_panel(panel)
    return _numbered(made.build())


def _numbered(made: dashboard.Dashboard) -> dashboard.Dashboard:
    """With an id for each panel, by its place: it stays the same when nothing moves."""
    number_ = 0
    for panel in made.panels or []:
        inner = panel.panels if isinstance(panel, dashboard.RowPanel) else []
        for each in (panel, *inner):
            number_ += 1
            each.id_val = number_
    return made
