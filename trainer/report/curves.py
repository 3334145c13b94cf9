"""Learning curves: loss and error of training and validation over the epochs, with the changes of the learning rate."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

from trainer.report.drawing import BLUE, GREEN, GREY, ORANGE, PINK, SERIES, WIDTH_PX, Figure, spec_of
from trainer.report.records import Log, RunRecord

MAX_POINTS: Final = 1500
"""Most points of a curve; more would enlarge the file without a visible difference."""

_HEIGHT_PX: Final = 250
_PLOT_PX: Final = WIDTH_PX - 70

_MARKED_RATES: Final = 12
"""Most changes of the learning rate that are marked by lines; a rate that changes all the time gets a panel of its own."""

_STYLES: Final = {
    "training": (BLUE, [1, 0]),
    "validation": (ORANGE, [1, 0]),
    "validation, top-5": (GREEN, [6, 3]),
    "averaged weights": (PINK, [2, 2]),
}
"""Colour and dashes of each curve of a single run."""

Row = dict[str, Any]


@dataclass(frozen=True)
class RateChange:
    """A change of the learning rate between two log lines.

    Fields:
        at: place on the horizontal axis: epochs completed, or the step.
        step: first logged step with the new rate.
        lr: the new rate.
        by_hand: True if the user set it.
    """

    at: float
    step: int
    lr: float
    by_hand: bool


def figure(runs: Sequence[RunRecord]) -> Figure | None:
    """Return the learning curves of one run, or of several in the same axes; None if no run has a log line."""
    runs = [run for run in runs if run.log.steps]
    if not runs:
        return None
    by_epoch = all(run.log.epoch_size for run in runs)
    rows = [row for run in runs for row in _rows(run, by_epoch)]
    changes = {run.name: rate_changes(run.log, by_epoch) for run in runs}
    one = len(runs) == 1
    marked = one and len(changes[runs[0].name]) <= _MARKED_RATES
    x_title = "epoch" if by_epoch else "step"
    panels = [
        _panel([row for row in rows if row["metric"] == metric], metric, one, changes[runs[0].name] if marked else [])
        for metric in ("loss", "error")
    ]
    if not marked:
        panels.append(_rate_panel([row for row in rows if row["metric"] == "learning rate"], one))
    axes = "Each panel has training and validation on the same axes"
    rates = "vertical lines mark changes of the learning rate" if marked else "the last panel has the learning rate"
    what = "Thin lines are single log lines of training" if one else "Each run has a colour; dotted lines are training"
    return Figure(
        name="curves",
        title="Learning curves",
        caption=f"{axes}, by {x_title}; {rates}. {what}; points are validations after an epoch, on the centre crop.",
        alt="; ".join(_in_words(run) for run in runs),
        spec=_stacked(panels, x_title),
        data={
            "x": x_title,
            "curves": rows,
            "learning_rates": {
                name: [{"step": c.step, x_title: c.at, "lr": c.lr, "by_hand": c.by_hand} for c in found]
                for name, found in changes.items()
            },
        },
    )


def rate_changes(log: Log, by_epoch: bool) -> list[RateChange]:
    """Return the changes of the learning rate from one log line to the next."""
    by_hand = {change.lr for change in log.by_hand}
    return [
        RateChange(_place(log, before, by_epoch), after.step, after.lr, after.lr in by_hand)
        for before, after in pairwise(log.steps)
        if after.lr != before.lr
    ]


def _place(log: Log, record: Any, by_epoch: bool) -> float:
    place = log.epoch_of(record) if by_epoch else record.step
    return float(place if place is not None else record.step)


def _rows(run: RunRecord, by_epoch: bool) -> Iterator[Row]:
    """Yield the points of a run's curves: run, curve, metric, x, step and value."""
    log = run.log
    for record in log.steps[:: max(1, -(-len(log.steps) // MAX_POINTS))]:
        at = {"run": run.name, "x": round(_place(log, record, by_epoch), 4), "step": record.step}
        yield at | {"curve": "training", "metric": "loss", "value": record.loss}
        yield at | {"curve": "training", "metric": "error", "value": record.error}
        yield at | {"curve": "training", "metric": "learning rate", "value": record.lr}
    for epoch in log.epochs:
        at = {"run": run.name, "x": epoch.epoch + 1 if by_epoch else epoch.step, "step": epoch.step}
        named = (
            ("validation", "loss", epoch.val_loss),
            ("validation", "error", epoch.val_top1_error),
            ("validation, top-5", "error", epoch.val_top5_error),
            ("averaged weights", "loss", epoch.ema_val_loss),
            ("averaged weights", "error", epoch.ema_val_top1_error),
        )
        for curve, metric, value in named:
            if value is not None:
                yield at | {"curve": curve, "metric": metric, "value": value}


def _panel(rows: Sequence[Row], metric: str, one: bool, changes: Sequence[RateChange]) -> Any:
    """Return a panel with the curves of one metric."""
    import altair as alt

    if not one:
        rows = [row for row in rows if row["curve"] in ("training", "validation")]
    chart = alt.Chart(alt.Data(values=list(rows)))
    kinds = list(dict.fromkeys(row["curve"] for row in rows))
    if one:
        colour = alt.Color(
            "curve:N",
            title=None,
            scale=alt.Scale(domain=kinds, range=[_STYLES[kind][0] for kind in kinds]),
            legend=alt.Legend(orient="top", symbolType="stroke", labelLimit=400),
        )
        detail = alt.StrokeDash(
            "curve:N", title=None, scale=alt.Scale(domain=kinds, range=[_STYLES[kind][1] for kind in kinds])
        )
    else:
        names = list(dict.fromkeys(row["run"] for row in rows))
        colours = [SERIES[i % len(SERIES)] for i in range(len(names))]
        colour = alt.Color(
            "run:N",
            title=None,
            scale=alt.Scale(domain=names, range=colours),
            legend=alt.Legend(orient="top", symbolType="stroke", labelLimit=400),
        )
        detail = alt.StrokeDash(
            "curve:N",
            title=None,
            scale=alt.Scale(domain=["training", "validation"], range=[[2, 2], [1, 0]]),
            legend=alt.Legend(orient="top", symbolType="stroke"),
        )
    axis = alt.Axis(format="%" if metric == "error" else "~g", tickCount=6, grid=True)
    y = alt.Y("value:Q", title=metric, axis=axis, scale=alt.Scale(zero=True, nice=True))
    x = alt.X("x:Q", title=None, axis=_x_axis())
    is_training = alt.datum.curve == "training"
    thin = chart.transform_filter(is_training).mark_line(strokeWidth=1.4, opacity=0.85).encode(x, y, colour, detail)
    thick = chart.transform_filter(~is_training).mark_line(strokeWidth=2.2).encode(x, y, colour, detail)
    points = chart.transform_filter(~is_training).mark_point(filled=True, size=36, opacity=1).encode(x, y, colour)
    layers = [*(_marks(changes) if changes else ()), thin, thick, points]
    title = {"loss": "Loss", "error": "Error: share of images whose best guess is wrong"}[metric]
    return alt.layer(*layers).properties(width=_PLOT_PX, height=_HEIGHT_PX, title=title)


def _marks(changes: Sequence[RateChange]) -> list[Any]:
    """Return a vertical line with the new rate for each change of it."""
    import altair as alt

    words = [{"x": c.at, "text": f"rate {c.lr:g}{' by hand' if c.by_hand else ''}"} for c in changes]
    chart = alt.Chart(alt.Data(values=words))
    rules = chart.mark_rule(color=GREY, strokeDash=[4, 3], strokeWidth=1.5).encode(alt.X("x:Q"))
    labels = chart.mark_text(align="left", baseline="top", dx=4, dy=4, fontSize=11).encode(
        x="x:Q", y=alt.value(0), text="text:N"
    )
    return [rules, labels]


def _rate_panel(rows: Sequence[Row], one: bool) -> Any:
    import altair as alt

    names = list(dict.fromkeys(row["run"] for row in rows))
    colours = [BLUE] if one else [SERIES[i % len(SERIES)] for i in range(len(names))]
    return (
        alt.Chart(alt.Data(values=list(rows)))
        .mark_line(interpolate="step-before", strokeWidth=2)
        .encode(
            x=alt.X("x:Q", title=None, axis=_x_axis()),
            y=alt.Y(
                "value:Q",
                title="learning rate",
                scale=alt.Scale(type="log", nice=False, padding=8),
                axis=alt.Axis(format="~g", tickCount=4),
            ),
            color=alt.Color("run:N", scale=alt.Scale(domain=names, range=colours), legend=None),
        )
        .properties(width=_PLOT_PX, height=_HEIGHT_PX // 2, title="Learning rate")
    )


def _x_axis() -> Any:
    import altair as alt

    return alt.Axis(grid=True, tickMinStep=1, format="~g", labelFlush=False)


def _stacked(panels: Sequence[Any], x_title: str) -> dict[str, Any]:
    """Return panels below each other, with one horizontal axis."""
    import altair as alt

    spec = spec_of(
        alt.vconcat(*panels, bounds="flush", spacing=92).resolve_scale(
            x="shared", color="independent", strokeDash="independent"
        )
    )
    last = spec["vconcat"][-1]
    for layer in last.get("layer", [last]):
        layer["encoding"]["x"]["title"] = x_title
    return spec


def _in_words(run: RunRecord) -> str:
    """Return the curves as a sentence."""
    steps, epochs = run.log.steps, run.log.epochs
    words = (
        f"{run.name}: the training loss goes from {steps[0].loss:.3g} to {steps[-1].loss:.3g} in {steps[-1].step} steps"
    )
    if epochs:
        words += (
            f"; the validation error goes from {epochs[0].val_top1_error:.1%} to {epochs[-1].val_top1_error:.1%} "
            f"in {len(epochs)} epochs"
        )
    return words
