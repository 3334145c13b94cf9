"""The report of one run, or of several side by side: a page, and its figures as files.

What a run cannot show (it has no checkpoint, its dataset is gone) is left out, and the page says so.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

import msgspec
import torch

from trainer.config import Source
from trainer.data.feed import Endpoint, LoaderServiceError, open_source, training_view
from trainer.data.samples import centre_crops, fed_samples, training_fingerprint, whole_record
from trainer.errors import ReportError, TrainerError
from trainer.report import confusion, curves, kernels, ledger, network, pictures, timing
from trainer.report.drawing import Figure, Pixels, check_installed
from trainer.report.inference import Look, Network, load_network, look, nearest
from trainer.report.page import Section, Shown, page
from trainer.report.pictures import Guessed, Neighbour
from trainer.report.progress import ReportProgress
from trainer.report.records import RunRecord, read_runs
from trainer.run.folder import write_atomically

PAGE: Final = "report.html"
FOLDER: Final = "report"

_ORDER: Final = (
    "curves",
    "guesses",
    "neighbours",
    "kernels",
    "confusion",
    "augmentation",
    "network",
    "time",
    "ledger",
)
"""Figures in the order of the page."""

_CANDIDATES: Final = 24
"""Training pictures of which one is shown with its crops."""

_UNSAFE: Final = re.compile(r"[^\w.-]")
"""Characters of a run's name that its files do not have."""


@dataclass(frozen=True)
class Settings:
    """Settings of a report.

    Fields:
        out: folder of its files; None chooses one.
        source: source of the images; None takes each run's own.
        timeout_s: time for a node to answer; a report does not wait for one that may never come back.
        device: device that computes.
        images: most images of each split that the network looks at.
        batch_size: images per batch.
    """

    out: Path | None
    source: Source | None
    timeout_s: float
    device: torch.device
    images: int
    batch_size: int


@dataclass
class Made:
    """A report that was written.

    Fields:
        page: path of the page.
        files: paths of all other files.
        missing: sentences that say what was left out.
    """

    page: Path
    files: list[Path] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


def write_report(paths: Sequence[Path], settings: Settings, progress: ReportProgress) -> Made:
    """Write the report of the runs in ``paths``: the page, and each figure as SVG, PNG and JSON.

    Raises:
        RunFolderError: no run was started in one of the folders.
        ReportError: the packages that draw are missing, the files cannot be written, or there is nothing to show.
    """
    check_installed()
    runs = read_runs(paths)
    out = settings.out or _default_folder(paths)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ReportError(f"the folder {out} cannot be created ({error.strerror})") from error
    made = Made(out / PAGE)
    several = len(runs) > 1
    shown = [(joint.name, Shown(joint)) for joint in (curves.figure(runs), timing.figure(runs)) if joint]
    for run in runs:
        missing, figures = _figures_of(run, settings, progress)
        made.missing += [f"{run.name}: {sentence}" if several else sentence for sentence in missing]
        for each in figures:
            named = replace(each, name=f"{_UNSAFE.sub('_', run.name)}-{each.name}") if several else each
            shown.append((each.name, Shown(named, run.name if several else "")))
    if not shown:
        raise ReportError(f"{' and '.join(map(str, paths))} has nothing that can be shown")
    sections = []
    for name in _ORDER:
        figures_of_kind = [each for kind, each in shown if kind == name]
        if figures_of_kind:
            sections.append(Section(name, figures_of_kind[0].figure.title, figures_of_kind))
    progress.say("drawing")
    try:
        for _, item in shown:
            made.files += item.figure.write(out)
        write_atomically(made.page, _page(runs, made.missing, sections).encode())
    except OSError as error:
        raise ReportError(f"{error.filename or out} cannot be written ({error.strerror})") from error
    return made


def _default_folder(paths: Sequence[Path]) -> Path:
    """Return RUN/report for one run, and for several a folder beside them."""
    if len(paths) == 1:
        return paths[0] / FOLDER
    return Path(os.path.commonpath([path.resolve().parent for path in paths])) / FOLDER


def _figures_of(run: RunRecord, settings: Settings, progress: ReportProgress) -> tuple[list[str], list[Figure]]:
    """Return a run's own figures, and sentences that say what is left out."""
    missing, figures = list(run.missing), list[Figure]()
    if not run.log.seconds:
        missing.append(
            "The log has no times of the phases, which this version writes, so it cannot show where the time went."
        )
    if (account := ledger.figure(run)) is not None:
        figures.append(account)
    if run.checkpoint is None:
        return missing, figures
    weights = [value.numpy() for name, value in run.checkpoint.model.items() if name.endswith("conv1.weight")]
    figures.append(kernels.figure(weights))
    progress.say(f"{run.name}: loading the network")
    try:
        net = load_network(run, settings.device)
    except TrainerError as error:
        return [*missing, f"The network cannot be used: {error}"], figures
    figures.append(network.figure(net.member.model, net.facts.crop))
    try:
        source = settings.source or run.checkpoint.plain.config.source
        with open_source(msgspec.structs.replace(source, timeout_s=settings.timeout_s)) as node:
            figures += _figures_of_data(run, net, node, settings, progress, missing)
    except (LoaderServiceError, TrainerError) as error:
        missing.append(f"{_WITHOUT_DATA}: {error}")
    return missing, figures


_WITHOUT_DATA: Final = (
    "The images cannot be read, so there are no guesses, no nearest pictures, no confusion matrix and no crops (--data DIR or "
    "--loader ADDRESS names another source)"
)


def _figures_of_data(
    run: RunRecord, net: Network, node: Endpoint, settings: Settings, progress: ReportProgress, missing: list[str]
) -> Iterator[Figure]:
    """Yield the figures that need images; add to ``missing`` what a split cannot show."""
    assert run.checkpoint is not None, "the caller looks for a checkpoint first"
    if training_fingerprint(node) != net.facts.fingerprint:
        missing.append(f"{_WITHOUT_DATA}: the node serves another dataset than the one that this run was trained on.")
        return
    progress.say(f"{run.name}: training images, for the nearest ones")
    training = look(net, node, "train", settings.images, settings.batch_size, progress.advance)
    yield from _augmentation(run, net, node, training)
    progress.say(f"{run.name}: validation images")
    try:
        validation = look(net, node, "val", settings.images, settings.batch_size, progress.advance)
    except LoaderServiceError as error:
        missing.append(f"There are no validation images, so no guesses and no confusion matrix: {error}")
        return
    names, result = net.facts.class_names, validation.evaluation
    about = (
        f"{result.images:,} of {validation.split_images:,} validation images, centre crop: top-1 error {result.top1_error:.1%}, "
        f"top-5 error {result.top5_error:.1%}."
    )
    yield confusion.figure(result.confusion, names, about)
    chosen = _one_of_each_class(validation, pictures.GUESSED + pictures.QUERIES)
    crops = centre_crops(node, "val", [int(validation.records[at]) for at in chosen], net.facts.crop)
    guessed = [_guessed(validation, at, pixels, names) for at, pixels in zip(chosen, crops, strict=True)]
    picked = "They are the first ones of a random order, from different classes as far as there are any."
    yield pictures.guesses(guessed[: pictures.GUESSED], picked)
    queries = list(zip(chosen, guessed, strict=True))[-pictures.QUERIES :]
    yield _neighbours(net, node, training, validation, queries)


def _augmentation(run: RunRecord, net: Network, node: Endpoint, training: Look) -> Iterator[Figure]:
    """Yield a training picture as the run's first epochs get it: of some, the one with the most contrast, to see something."""
    assert run.checkpoint is not None, "the caller looks for a checkpoint first"
    config = run.checkpoint.plain.config
    candidates = training.records[:_CANDIDATES].tolist()
    crops = centre_crops(node, "train", candidates, net.facts.crop)
    at = max(range(len(crops)), key=lambda n: float(crops[n].std()))
    record, label = candidates[at], int(training.labels[at])
    view = training_view(net.member.model.preset, config.ablation, node)
    fed = fed_samples(node, view, net.facts.crop, config.seed, record, pictures.EPOCHS)
    yield pictures.augmentation(whole_record(node, "train", record), fed, net.facts.class_names[label], record)


def _neighbours(
    net: Network, node: Endpoint, training: Look, validation: Look, queries: Sequence[tuple[int, Guessed]]
) -> Figure:
    """Return the training pictures that are nearest to some validation pictures."""
    units = validation.units[[at for at, _ in queries]]
    distances, places = nearest(units, training.units, pictures.NEIGHBOURS)
    rows = []
    for (_, query), near, far in zip(queries, places.tolist(), distances.tolist(), strict=True):
        records = [int(training.records[at]) for at in near]
        crops = centre_crops(node, "train", records, net.facts.crop)
        labels = [net.facts.class_names[int(training.labels[at])] for at in near]
        rows.append((query, [Neighbour(*each) for each in zip(records, crops, labels, far, strict=True)]))
    compared = f"{len(training.records):,} of {training.split_images:,} training pictures were compared, centre crop."
    return pictures.neighbours(rows, net.hidden, compared)


def _guessed(found: Look, at: int, pixels: Pixels, names: Sequence[str]) -> Guessed:
    pairs = zip(found.best[at].tolist(), found.probabilities[at].tolist(), strict=True)
    return Guessed(
        int(found.records[at]), pixels, names[int(found.labels[at])], [(names[label], share) for label, share in pairs]
    )


def _one_of_each_class(found: Look, count: int) -> list[int]:
    """Return indices of ``count`` images: in their order, first one of each class, then a second one, and so on."""
    seen: dict[int, int] = {}
    turns = []
    for at, label in enumerate(found.labels.tolist()):
        turns.append((seen.get(label, 0), at))
        seen[label] = seen.get(label, 0) + 1
    return [at for _, at in sorted(turns)[:count]]


def _page(runs: Sequence[RunRecord], missing: Sequence[str], sections: Sequence[Section]) -> str:
    one = len(runs) == 1
    version = importlib.metadata.version("loader-service")
    return page(
        title=f"Training report: {', '.join(run.name for run in runs)}",
        subtitle=_subtitle(runs[0]) if one else "Runs side by side",
        facts=_facts(runs[0]) if one else (),
        comparison=() if one else _comparison(runs),
        missing=missing,
        sections=sections,
        made_by=f"Made by trainer report, loader-service {version}, on {time.strftime('%d %B %Y at %H:%M')}.",
    )


def _subtitle(run: RunRecord) -> str:
    if run.about is None:
        return ""
    config, machine = run.about.config, run.about.machine
    devices = ", ".join(map(str, machine.get("gpus") or ())) or f"{machine.get('cpus', 'unknown')} CPU cores"
    return (
        f"preset {config.preset}, width {config.width:g}, {config.towers} tower{'s' if config.towers > 1 else ''}; batches of "
        f"{config.batch_size}, rate {config.lr:g}, seed {config.seed}; {devices}"
    )


def _facts(run: RunRecord) -> list[tuple[str, str]]:
    """Return the results of a run in large type; none of a run that has not written its summary yet."""
    summary = run.summary
    if summary is None:
        return []
    facts = []
    if summary.accuracy is not None and summary.top5_accuracy is not None:
        facts += [
            (f"{1 - summary.accuracy:.1%}", "top-1 validation error"),
            (f"{1 - summary.top5_accuracy:.1%}", "top-5 validation error"),
            (f"{1 - summary.chance:.1%}", "error of guessing"),
        ]
    return [
        *facts,
        (f"{summary.epochs:,}", "epochs" if summary.finished else "epochs, not finished"),
        (f"{summary.steps:,}", "steps"),
        (f"{summary.images_per_s:,.0f}", "images per second"),
        (f"{summary.waiting_share:.1%}", "of the time waiting for data"),
    ]


def _comparison(runs: Sequence[RunRecord]) -> list[list[str]]:
    rows = [["run", "preset", "width", "batch", "rate", "epochs", "top-1 error", "top-5 error", "images/s", "waiting"]]
    for run in runs:
        summary, given = run.summary, [""] * 4
        if run.about:
            config = run.about.config
            given = [config.preset, f"{config.width:g}", str(config.batch_size), f"{config.lr:g}"]
        results = [""] * 5
        if summary:
            errors = [
                f"{1 - share:.1%}" if share is not None else "" for share in (summary.accuracy, summary.top5_accuracy)
            ]
            results = [str(summary.epochs), *errors, f"{summary.images_per_s:,.0f}", f"{summary.waiting_share:.1%}"]
        rows.append([run.name, *given, *results])
    return rows
