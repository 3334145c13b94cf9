"""The ledger of samples: for each epoch the samples expected and delivered, and what the loader did to make them equal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from loader_service.types import EpochAccount
from trainer.report.drawing import BLUE, GREEN, ORANGE, PINK, WIDTH_PX, Figure, spec_of
from trainer.report.records import RunRecord

_PLOT_PX: Final = WIDTH_PX - 90
_INCIDENTS: Final = {
    "duplicates refused": ("duplicates_refused", ORANGE),
    "slices asked for again": ("reassigned", PINK),
    "samples substituted": ("substituted", GREEN),
}
_WIDEST_BAR_PX: Final = 48
_BELOW: Final = (
    " Below: duplicates that were refused, slices that were asked for again because a worker or a node was lost, and samples "
    "that replace damaged records."
)


def figure(run: RunRecord) -> Figure | None:
    """Return the ledger of a run; None if it has none."""
    accounts = run.ledger
    if not accounts:
        return None
    exact = sum(account.delivered == account.expected for account in accounts)
    delivered, expected = sum(a.delivered for a in accounts), sum(a.expected for a in accounts)
    verdict = (
        "Every sample of every epoch was delivered exactly once."
        if exact == len(accounts)
        else f"{exact} of {len(accounts)} epochs are complete; in the others the run was stopped."
    )
    rare = {words: sum(getattr(account, name) for account in accounts) for words, (name, _) in _INCIDENTS.items()}
    return Figure(
        name="ledger",
        title="Ledger of samples",
        caption=f"{verdict} Bars are the samples delivered in each epoch, black ticks the samples expected."
        + (_BELOW if any(rare.values()) else " No sample was refused, repeated or replaced."),
        alt=f"{delivered:,} of {expected:,} samples in {len(accounts)} epochs; "
        + ", ".join(f"{count:,} {words}" for words, count in rare.items()),
        spec=_chart(accounts),
        data=list(accounts),
        table=_table(accounts),
    )


def _table(accounts: Sequence[EpochAccount]) -> list[list[str]]:
    rows = [["epoch", "expected", "delivered", *_INCIDENTS]]
    for account in accounts:
        counts = [account.expected, account.delivered, *(getattr(account, name) for name, _ in _INCIDENTS.values())]
        rows.append([str(account.epoch + 1), *(f"{count:,}" for count in counts)])
    return rows


def _chart(accounts: Sequence[EpochAccount]) -> dict[str, Any]:
    import altair as alt

    rows = [{"epoch": a.epoch + 1, "delivered": a.delivered, "expected": a.expected} for a in accounts]
    bar_px = min(_WIDEST_BAR_PX, 0.7 * _PLOT_PX / len(accounts))
    domain = [0.5, max(account.epoch for account in accounts) + 1.5]
    axis = alt.Axis(tickMinStep=1, grid=False)
    x = alt.X("epoch:Q", title="epoch", scale=alt.Scale(domain=domain, nice=False), axis=axis)
    chart = alt.Chart(alt.Data(values=rows))
    y = alt.Y("delivered:Q", title="samples", axis=alt.Axis(format="~s", tickCount=4))
    tick = {"orient": "horizontal", "size": bar_px}
    upper = alt.layer(
        chart.mark_bar(size=bar_px, color=BLUE).encode(x=x, y=y),
        chart.mark_tick(thickness=5, color="white", **tick).encode(x=x, y="expected:Q"),
        chart.mark_tick(thickness=2, color="black", **tick).encode(x=x, y="expected:Q"),
    ).properties(width=_PLOT_PX, height=130, title="Delivered, and expected")
    incidents = [
        {"epoch": account.epoch + 1, "kind": words, "count": count}
        for account in accounts
        for words, (name, _) in _INCIDENTS.items()
        if (count := getattr(account, name))
    ]
    if not incidents:
        return spec_of(upper)
    colours = alt.Scale(domain=list(_INCIDENTS), range=[colour for _, colour in _INCIDENTS.values()])
    lower = (
        alt.Chart(alt.Data(values=incidents))
        .mark_bar(size=bar_px)
        .encode(
            x=x,
            y=alt.Y("count:Q", title="count", stack=True, axis=alt.Axis(tickMinStep=1, tickCount=3, format="~s")),
            color=alt.Color(
                "kind:N",
                title=None,
                scale=colours,
                legend=alt.Legend(orient="bottom", symbolType="square", labelLimit=400),
            ),
        )
        .properties(width=_PLOT_PX, height=70, title="Refused, repeated and replaced")
    )
    return spec_of(alt.vconcat(upper, lower, bounds="flush", spacing=84))
