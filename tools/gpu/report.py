"""docs/gpu.md, written from the JSON results alone."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from tools.bench.trainer import FED_SHARE, TARGETS
from tools.gpu.measure.feed import STAGES, SYNTHETIC, TRAINER
from tools.gpu.parts import Name
from tools.gpu.results import Agreement, Fed, Learned, Loading, Marked, Rate, Results, Row, Status

CIFAR10_ERROR: Final = 0.12
"""Highest test error of CIFAR-10 with ten crops that meets the target."""

HEADER: Final = """# On a GPU

Written by `make gpu` from {source}; do not edit.

    make gpu                                          the Python of .venv
    make gpu PYTHON=python3 WHEELS=DIR                another Python with PyTorch >= 2.4, without .venv and without a network
    make gpu-wheels PYTHON_VERSION=3.12 WHEELS=DIR    that folder of wheels, made where there is a network
    make gpu ARGS="--minutes 9"                       what fits into nine minutes; the next call continues
    make gpu ARGS="--again speed,feed"                measure parts again
    make gpu ARGS=--dry                               the same script on a CPU, with tiny sizes

Parts run in this order, each in processes of its own under a time limit: tests marked `gpu`; each faster form against the plain
one; speed of the bfloat16 forms beside torchvision's AlexNet; training fed by a node; loaders alone; CIFAR-10; speed of the
float32 forms. Results are on disk after each figure, so a run that is killed loses one figure. `--parts` chooses parts,
`--cifar10 FILE` names the archive, `--photographs DIR` the images that records are cut from (synthetic ones by default).
`--results FILE` and `--document FILE` write elsewhere; `--report` writes the document from results of another machine."""

NOTHING: Final = """## Nothing has been measured yet

No GPU has run this command. Targets, none of which is met or missed so far:"""

Format = Callable[[float], str]


def markdown(results: Results | None, source: str) -> str:
    """Return the whole document.

    Args:
        results: None if nothing was measured.
        source: name of the file of the results.
    """
    header = HEADER.format(source=source)
    if results is None or results.machine is None:
        return "\n\n".join([header, NOTHING, _targets(Results())]) + "\n"
    sections = [
        header,
        _machine(results),
        "## Targets\n\n" + _targets(results),
        _section("Tests marked `gpu`", _tests(results)),
        _section("Faster forms against the plain one", _agreement(results)),
        _section("Speed", _speed(results)),
        _section("Fed by a node on the same machine", _feed(results)),
        _section("Loaders alone", _loaders(results)),
        _section("CIFAR-10", _cifar10(results)),
        _section("Not measured", _missing(results)),
    ]
    return "\n\n".join(filter(None, sections)) + "\n"


def _section(title: str, content: str) -> str:
    return f"## {title}\n\n{content}" if content else ""


def _machine(results: Results) -> str:
    machine = results.machine
    assert machine is not None
    gpus = ", ".join(machine.gpus) or "no GPU"
    memory = f" ({machine.memory_gib:.0f} GiB)" if machine.gpus else ""
    software = f"PyTorch {machine.torch}{f', CUDA {machine.cuda}' if machine.cuda else ''}, Python {machine.python}"
    dry = "**A dry run on a CPU with tiny sizes: its figures mean nothing.** " if results.dry else ""
    return f"{dry}{gpus}{memory}; {machine.host}; {software}. {results.started} to {results.changed}."


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], right: int) -> str:
    """Return a table whose last ``right`` columns are numbers; empty without rows."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    if not lines:
        return ""
    rule = ["---"] * (len(head) - right) + ["---:"] * right
    return "\n".join([f"| {' | '.join(head)} |", f"|{'|'.join(rule)}|", *lines])


def _spread(rates: Sequence[float]) -> str:
    """Return the median, with the lowest and highest in brackets if there are several."""
    median = f"{statistics.median(rates):,.0f}"
    return f"{median} [{min(rates):,.0f}, {max(rates):,.0f}]" if len(rates) > 1 else median


def _problems(rows: Iterable[Row]) -> str:
    """Return the figures that are absent, with their reasons."""
    return "\n".join(f"- {row.name}: {row.problem}" for row in rows if row.problem)


def _join(*parts: str) -> str:
    return "\n\n".join(filter(None, parts))


# Targets


def _targets(results: Results) -> str:
    rows = [
        *(_speed_target(results, batch, target) for batch, target in TARGETS.items()),
        *(_peer_target(results, batch) for batch in TARGETS),
        _fed_target(results),
        _cifar10_target(results),
    ]
    return _table(("target", "figure", "met"), rows, 0)


def _met(value: bool) -> str:
    return "yes" if value else "no"


def _rates(results: Results, batch: int) -> list[Rate]:
    every = results.of(Name.SPEED, Rate) + results.of(Name.FLOAT32, Rate)
    return [row for row in every if row.batch == batch and row.images_per_s]


def _best(rows: Iterable[Rate]) -> Rate | None:
    return max(rows, key=lambda row: statistics.median(row.images_per_s), default=None)


def _wrong(results: Results) -> set[str]:
    """Return the forms that did not agree with the plain one: they meet no target."""
    return {row.form for row in results.of(Name.AGREEMENT, Agreement) if not row.agrees}


def _ours(results: Results, batch: int) -> Rate | None:
    wrong = _wrong(results)
    return _best(row for row in _rates(results, batch) if not row.peer and row.title not in wrong)


def _speed_target(results: Results, batch: int, target: int) -> tuple[str, str, str]:
    what = f"{target:,} images/s at batch {batch} on an H100 or better"
    if (best := _ours(results, batch)) is None:
        return what, "-", "not measured"
    median = statistics.median(best.images_per_s)
    return what, f"{median:,.0f} ({best.title})", _met(median >= target)


def _peer_target(results: Results, batch: int) -> tuple[str, str, str]:
    what = f"faster than torchvision's AlexNet at batch {batch}"
    ours, peer = _ours(results, batch), _best(row for row in _rates(results, batch) if row.peer)
    if ours is None or peer is None:
        return what, "-", "not measured"
    ratio = statistics.median(ours.images_per_s) / statistics.median(peer.images_per_s)
    return what, f"{ratio:.2f} times", _met(ratio > 1)


def _fed_target(results: Results) -> tuple[str, str, str]:
    what = f"fed by a node at {FED_SHARE:.0%} of synthetic speed or more"
    shares = [
        (share, row)
        for row in results.of(Name.FEED, Fed)
        if row.path == TRAINER and (share := _share(results, row)) is not None
    ]
    if not shares:
        return what, "-", "not measured"
    figure = "; ".join(f"{share:.1%} ({row.codec}, batch {row.batch})" for share, row in shares)
    return what, figure, _met(all(share >= FED_SHARE for share, _ in shares))


def _cifar10_target(results: Results) -> tuple[str, str, str]:
    what = f"CIFAR-10: at most {CIFAR10_ERROR:.0%} error with ten crops"
    rows = [row for row in results.of(Name.CIFAR10, Learned) if row.ten_crop_error is not None]
    if not rows or rows[-1].ten_crop_error is None:
        return what, "-", "not measured"
    row, error = rows[-1], rows[-1].ten_crop_error
    return what, f"{error:.1%} after {row.epochs} of {row.of_epochs} epochs", _met(error <= CIFAR10_ERROR)


# Parts


def _tests(results: Results) -> str:
    text = []
    for row in results.of(Name.TESTS, Marked):
        if not row.problem:
            text.append(f"{row.passed} passed, {row.failed} failed, {row.skipped} skipped.")
        text += ["\n".join(f"- `{name}`" for name in row.failures)]
    return _join(*text, _problems(results.of(Name.TESTS, Marked)))


def _agreement(results: Results) -> str:
    rows = results.of(Name.AGREEMENT, Agreement)
    table = _table(
        ("form", "layout", "agrees", "loss", "gradient", "worst parameter's", "update"),
        [
            (
                *(row.form, row.layout, _met(row.agrees), f"{row.loss:.1e}", f"{row.gradient:.1e}"),
                f"{row.worst:.1e} (`{row.where}`)",
                f"{row.update:.1e}",
            )
            for row in rows
        ],
        0,
    )
    about = (
        "Relative differences from the plain float32 form on one device, over three steps on the same batch: losses, "
        "the gradient in the first step, whole and of the parameter that differs most, and the change of all parameters. TF32 is "
        "off here. A bfloat16 form may differ twice as much as bfloat16 alone does."
    )
    return _join(about, table) if rows else ""


def _speed(results: Results) -> str:
    rows = [*results.of(Name.SPEED, Rate), *results.of(Name.FLOAT32, Rate)]
    table = _table(
        ("form", "batch", "images/s", "MFU"),
        [
            (
                f"*{row.title}*" if row.peer else row.title,
                *(str(row.batch), _spread(row.images_per_s), "-" if row.used is None else f"{row.used:.1%}"),
            )
            for row in sorted(rows, key=lambda row: row.batch)
            if row.images_per_s
        ],
        3,
    )
    about = (
        "Whole training steps (mean subtraction, forward, backward, update) on one batch of noise that stays on the device; "
        "median of the rounds, lowest and highest in brackets. Forms of one group take turns."
    )
    return _join(about, table, _problems(rows)) if rows else ""


def _share(results: Results, row: Fed) -> float | None:
    """Return a fed rate as a share of the synthetic one that took turns with it."""
    kind = row.name.partition(",")[0]
    for other in results.of(Name.FEED, Fed):
        same = (other.codec, other.batch, other.name.partition(",")[0]) == (row.codec, row.batch, kind)
        if same and other.path == SYNTHETIC and other.images_per_s and row.images_per_s:
            return statistics.median(row.images_per_s) / statistics.median(other.images_per_s)
    return None


def _feed(results: Results) -> str:
    rows = results.of(Name.FEED, Fed)
    lines = []
    for row in rows:
        if row.images_per_s:
            share = _share(results, row)
            waits = [f"{row.waits[stage]:.0%}" if stage in row.waits else "-" for stage in STAGES]
            shown = "-" if share is None or row.path == SYNTHETIC else f"{share:.1%}"
            lines.append((f"{row.path}, {row.codec}", str(row.batch), _spread(row.images_per_s), shown, *waits))
    table = _table(("path, records", "batch", "images/s", "of synthetic", *STAGES), lines, 7)
    forms = ", ".join(dict.fromkeys(row.form for row in rows))
    workers = ", ".join(dict.fromkeys(str(row.workers) for row in rows))
    about = (
        f"Form: {forms}; the node has {workers} workers. `{TRAINER}` is that of `trainer run`. The other paths use "
        "`loader_service.torch.TensorLoader`, which copies from pinned slots beside the computation, and the plain copy from "
        "pageable memory. Each is compared with the same steps on one batch that stays on the device, in turns. The last four "
        "columns are the training thread's time."
    )
    return _join(about, table, _problems(rows)) if rows else ""


def _loaders(results: Results) -> str:
    rows = results.of(Name.LOADERS, Loading)
    counts = sorted({row.workers for row in rows if row.images_per_s})
    titles = dict.fromkeys(row.title for row in rows if row.images_per_s)
    rates = {(row.title, row.workers): _spread(row.images_per_s) for row in rows if row.images_per_s}
    head = ("loader", *(f"{count} workers" if count > 1 else "1 worker" for count in counts))
    lines = [(title, *(rates.get((title, count), "-") for count in counts)) for title in titles]
    about = (
        "Images/s of 224 crops and mirror images of 256 x 256 records, batches of 128 uint8, nothing else running; this "
        "project also applies the colour jitter."
    )
    missing = "\n".join(dict.fromkeys(f"- {row.title}: {row.problem}" for row in rows if row.problem))
    return _join(about, _table(head, lines, len(counts)), missing) if rows else ""


def _cifar10(results: Results) -> str:
    rows = results.of(Name.CIFAR10, Learned)
    percent: Format = "{:.1%}".format
    return _table(
        ("form", "epochs", "error, centre crop", "error, ten crops", "images/s", "waiting for data"),
        [
            (
                *(row.form, f"{row.epochs} of {row.of_epochs}"),
                *("-" if error is None else percent(error) for error in (row.centre_error, row.ten_crop_error)),
                *(f"{row.images_per_s:,.0f}", percent(row.waiting_share)),
            )
            for row in rows
        ],
        4,
    )


def _missing(results: Results) -> str:
    lines = []
    for part in results.parts:
        for piece in part.pieces:
            outcome = results.outcomes.get(f"{part.name}/{piece}")
            if piece in part.without:
                lines.append(f"- {part.title}: {part.without[piece]}")
            elif outcome is None:
                lines.append(f"- {part.title}, {piece}: not reached yet")
            elif outcome.status is not Status.DONE:
                lines.append(f"- {part.title}, {piece}: {outcome.status} ({outcome.reason})")
    return "\n".join(lines)
