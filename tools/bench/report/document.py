"""``docs/benchmarks.md`` and its chart, written from the results of a run alone."""

from __future__ import annotations

import os
import platform
import statistics
from pathlib import Path
from typing import Final

import msgspec

from tools.bench.contest import Contestant, Kind, Rounds
from tools.bench.records import Facts
from tools.bench.report.chart import Row, draw
from tools.bench.report.targets import Spread, Target, ratio, spread, targets
from tools.bench.single import Single
from tools.bench.studies.boundary import STEP_S
from tools.bench.turns import BATCH

CHART: Final = "benchmarks.svg"
"""File name of the chart, in the document's folder."""

LIMITS: Final = {"raw": "memcpy", "jpeg": "decode"}
"""The limit that contestants of each codec are compared with."""


class Results(msgspec.Struct, frozen=True):
    """The results of a run, as ``build/bench/results.json`` holds them.

    Fields:
        date: UTC, for people.
        machine: machine of the run, for people.
        versions: versions of this project's parts and of each peer, for people.
        load: load average over a minute, before the first round and after the last.
        records: facts about the records.
        workers: worker processes or threads of every contestant.
        seconds: length of a turn.
        contestants: contestants that were measured.
        rounds: their turns.
        single: measurements without turns, None if left out.
        missing: reason for each peer that was not measured.
    """

    date: str
    machine: str
    versions: dict[str, str]
    load: tuple[float, float]
    records: Facts
    workers: int
    seconds: float
    contestants: list[Contestant]
    rounds: Rounds
    single: Single | None
    missing: dict[str, str]


def cpu_name() -> str:
    """Return the processor's name, or its architecture if the system does not know the name."""
    # x86-64 has this line; kernels of arm64 do not.
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def machine() -> str:
    """Describe this machine in a line."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return f"{cpu_name()}, {os.cpu_count()} cores, {memory:.0f} GiB, {platform.system()} {platform.release()}"


def shown(figures: Spread, form: str) -> str:
    """Format a median with ``form``, followed by the lowest and the highest value if they differ."""
    if figures.least == figures.most:
        return f"{figures.median:{form}}"
    return f"{figures.median:{form}} ({figures.least:{form}} to {figures.most:{form}})"


def markdown(results: Results, notes: str) -> str:
    """Return the whole document."""
    parts = [
        "# Benchmarks",
        "Written by `make bench` from one run. Do not edit; the last section is benchmarks-notes.md.",
        _setting(results),
        "## Targets",
        _target_table(targets(results.rounds, results.single)),
        f"![Bar chart of the tables below]({CHART})",
    ]
    for codec in LIMITS:
        parts += [f"## {codec.capitalize()} records", _table(results, codec)]
    if results.single:
        parts += ["## Other measurements", _single(results.single)]
    if results.missing:
        parts += ["## Not measured", "\n".join(f"- {peer}: {why}" for peer, why in results.missing.items())]
    return "\n\n".join([*parts, notes.strip()]).rstrip() + "\n"  # no notes: rstrip() removes the empty part


def chart(results: Results) -> str:
    """Return the chart of all contestants, an SVG document."""
    panels = {
        f"{codec} records": [
            Row(
                each.title.replace("**", ""),  # Markdown's bold, which SVG would show as stars
                each.kind,
                _rate(results, each),
                _cpu_s(results, each),
                _memory(results, each),
            )
            for each in _ranking(results, codec)
        ]
        for codec in LIMITS
    }
    return draw(panels, f"{results.machine}; {results.workers} workers; {results.date}")


def _setting(results: Results) -> str:
    # play() gives every contestant the same number of turns, so the first one's count is everyone's.
    facts, rounds = results.records, len(next(iter(results.rounds.values())))
    load = f"load average {results.load[0]:.2f} before and {results.load[1]:.2f} after"
    versions = "; ".join(f"{name}: {version}" for name, version in results.versions.items())
    return f"""- {results.date}; {results.machine}; {load}.
- {facts.records:,} records, cuts of {facts.photographs} photographs ({facts.source}); jpeg records: {facts.parameters},
  {facts.psnr_db:.1f} dB and {facts.jpeg_bytes / 1000:.1f} KB on average.
- Batches of {BATCH} images, (224, 224, 3) uint8, in the consumer's memory; a byte of every page is read. Every contestant has
  {results.workers} workers (threads or processes), and {rounds} interleaved rounds of {results.seconds:g} s each, after a warm-up.
- This project crops, flips and shifts colours; peers crop and flip. Samples of every sixteenth batch of this project are
  compared with the pure function while the clock runs.
- Contestants run in groups, so that few run at once: raw records in memory, raw records over TCP, jpeg records, tf.data
  service (which keeps filling its buffers during the turns of others).
- Figures are medians over the rounds, with the lowest and the highest in brackets. Ratios are taken within a round; across
  groups, between rounds of the same number.
- {versions}."""


def _target_table(found: list[Target]) -> str:
    rows = ["| what | target | here | reached |", "| --- | --- | --- | --- |"]
    for target in found:
        if target.figure is None:
            rows.append(f"| {target.what} | {target.need} | not measured | - |")
        else:
            rows.append(f"| {target.what} | {target.need} | {shown(target.figure, '.2f')} | {_verdict(target)} |")
    return "\n".join(rows)


def _verdict(target: Target) -> str:
    if target.disturbed:
        return "not claimed: above the limit, so the limit's turns were disturbed"
    if target.reached or target.figure is None:  # no figure: for mypy; _target_table() never asks
        return "yes"
    # `need` ends in the number ("at least 0.60"). Of an upper bound, a missed target shows more than 100 %.
    need = float(target.need.split()[-1])
    return f"no: {target.figure.median / need:.0%} of the target"


def _table(results: Results, codec: str) -> str:
    of_limit, of_peer = f"x {LIMITS[codec]}", "x best peer"
    rows = [
        f"| | images/s | CPU s / 1,000 | memory, MB | {of_limit} | {of_peer} |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    there = _ranking(results, codec)
    # A peer is compared with the peers too, itself included: the best one of a round has a ratio of 1.
    rivals = [each.name for each in there if each.kind is Kind.PEER]
    for each in there:
        figures = [
            shown(spread([turn.images_per_s for turn in results.rounds[each.name]]), ",.0f"),
            f"{_cpu_s(results, each):.3f}",
            f"{_memory(results, each):,.0f}",
            _ratio(results, each.name, [LIMITS[codec]]),
            _ratio(results, each.name, rivals),
        ]
        rows.append(f"| {each.title} | {' | '.join(figures)} |")
    return "\n".join(
        [*rows, "", "Memory is the largest proportional set size of all processes together, LMDB's pages included."]
    )


def _single(single: Single) -> str:
    starts, memory = spread(single.starts_s), spread(single.worker_mb)
    whole, alone = spread(single.preprocess_per_s), spread(single.standardise_per_s)
    compared = "; ".join(f"{row} {shown(spread(costs), '.1%')}" for row, costs in single.checksums.items())
    return f"""- From the start of the node's process to the first batch at a client: {shown(starts, ".2f")} s.
- 128 positions of an order over a billion records: {single.order_us:.0f} us at any place; nothing grows with the dataset.
- Comparing records with their checksums, as a share of a sample's CPU time in a worker: {compared}.
- Private memory of a worker after an epoch, without LMDB's pages and the client's slots: {shown(memory, ".1f")} MB.
- Preprocessing of {single.originals:,} originals, process start and manifest included: {shown(whole, ",.0f")}/s. As many processes
  that only decode and resize, with libjpeg-turbo and Pillow-SIMD: {shown(alone, ",.0f")}/s.""" + (
        f"\n- With steps of {1e3 * STEP_S:.0f} ms: {single.boundary}." if single.boundary else ""
    )


def _ranking(results: Results, codec: str) -> list[Contestant]:
    there = [each for each in results.contestants if each.codec == codec]
    # Limits among the others: the table shows how far each is from them.
    return sorted(there, key=lambda each: -_rate(results, each))


def _cpu_s(results: Results, each: Contestant) -> float:
    # Milliseconds per image are seconds per 1,000 images.
    return statistics.median(turn.cpu_ms for turn in results.rounds[each.name])


def _memory(results: Results, each: Contestant) -> float:
    return max(turn.memory_mb for turn in results.rounds[each.name])


def _rate(results: Results, each: Contestant) -> float:
    return statistics.median(turn.images_per_s for turn in results.rounds[each.name])


def _ratio(results: Results, name: str, others: list[str]) -> str:
    found = ratio(results.rounds, name, others)
    return "-" if found is None else shown(found, ".2f")
