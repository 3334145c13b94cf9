"""The time of a run by phase, as its recorder logged it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from trainer.report.drawing import BLUE, GREEN, GREY, ORANGE, PINK, SERIES, SKY, WIDTH_PX, YELLOW, Figure, spec_of
from trainer.report.records import RunRecord
from trainer.run.step_clock import BETWEEN_STEPS, Phase

_COLOURS: Final = {
    Phase.WAITING: ORANGE,
    Phase.COPY: YELLOW,
    Phase.FORWARD: SKY,
    Phase.EXCHANGE: PINK,
    Phase.BACKWARD: BLUE,
    Phase.UPDATE: GREEN,
}
_BAR_PX: Final = 22


def figure(runs: Sequence[RunRecord]) -> Figure | None:
    """Return the shares of a run's time by phase, or those of several runs; None if no run has logged them."""
    runs = [run for run in runs if run.log.seconds]
    if not runs:
        return None
    rows = [row for run in runs for row in _rows(run)]
    seconds = {run.name: sum(run.log.seconds.values()) for run in runs}
    return Figure(
        name="time",
        title="Where the time went",
        caption="Share of the run's time in each phase of a step, and between steps. Waiting is the wait for data; exchange is "
        "the exchange between the towers and between replicas; other is log lines and bookkeeping. "
        + "; ".join(f"{name}: {_duration(total)} in all" for name, total in seconds.items())
        + ".",
        alt="; ".join(f"{row['run']}, {row['phase']}: {row['label']}" for row in rows),
        spec=_chart(rows, [run.name for run in runs]),
        data={"runs": rows, "seconds": seconds},
    )


def _rows(run: RunRecord) -> list[dict[str, Any]]:
    seconds = run.log.seconds
    total, steps = sum(seconds.values()), sum(record.steps for record in run.log.times)
    validations = max(1, len(run.log.epochs))
    rows = []
    for phase in Phase:
        spent = seconds.get(phase.value, 0.0)
        per, unit = (validations, "an epoch") if phase in BETWEEN_STEPS else (max(1, steps), "a step")
        rows.append(
            {
                "run": run.name,
                "phase": phase.value,
                "seconds": round(spent, 6),
                "share": spent / total,
                "label": f"{spent / total:.1%}, {_amount(spent / per)} {unit}",
                "colour": _COLOURS.get(phase, GREY),
            }
        )
    return rows


def _chart(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    import altair as alt

    one = len(names) == 1
    chart = alt.Chart(alt.Data(values=list(rows)))
    y = alt.Y("phase:N", sort=[phase.value for phase in Phase], title=None, axis=alt.Axis(ticks=False, labelPadding=8))
    x = alt.X(
        "share:Q", title="share of the run's time", axis=alt.Axis(format="%", grid=True), scale=alt.Scale(nice=True)
    )
    by_run = {} if one else {"yOffset": alt.YOffset("run:N", sort=list(names))}
    colour = (
        alt.Color("colour:N", scale=None)
        if one
        else alt.Color(
            "run:N",
            title=None,
            scale=alt.Scale(domain=list(names), range=[SERIES[i % len(SERIES)] for i in range(len(names))]),
            legend=alt.Legend(orient="top", symbolType="square", labelLimit=400),
        )
    )
    bars = chart.mark_bar(cornerRadiusEnd=2).encode(x=x, y=y, color=colour, **by_run)
    labels = chart.mark_text(align="left", dx=6, fontSize=11).encode(x=x, y=y, text="label:N", **by_run)
    height = len(Phase) * (_BAR_PX * len(names) + 6)
    return spec_of(alt.layer(bars, labels).properties(width=WIDTH_PX - 260, height=height))


def _amount(seconds: float) -> str:
    """Return a time with three digits, in the unit that suits it."""
    if seconds >= 1:
        return f"{seconds:.3g} s"
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} µs"


def _duration(seconds: float) -> str:
    minutes, whole = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {whole} s" if minutes else f"{seconds:.3g} s"
