"""Images per second and MFU of every form, beside torchvision's AlexNet, in turns on one GPU."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterable
from typing import Final

import msgspec
import torch

from tools.bench.contest import Contestant, Kind
from tools.gpu.measure import forms
from tools.gpu.measure.turns import play
from tools.gpu.parts import Settings, installed
from tools.gpu.results import AnyRow, Rate
from trainer.model.alexnet import IMAGE_SIDE_PX, Sizes
from trainer.model.flops import peak_flops, training_flops

CLASSES: Final = 1000
PEER: Final = "torchvision's AlexNet, bf16, compiled"
READY_S: Final = 130.0
"""Time in which all contestants of a group are ready: compilation for a GPU takes up to a minute."""


def run(settings: Settings, piece: str, emit: Callable[[AnyRow], None]) -> None:
    """Measure torchvision's network and the bfloat16 forms at the batch size that the piece names."""
    chosen = [form for form in forms.names(settings.dry) if form.startswith("bf16")]
    _measure(settings, int(piece.split()[-1]), reversed(chosen), True, emit)


def run_float32(settings: Settings, piece: str, emit: Callable[[AnyRow], None]) -> None:
    """Measure the float32 forms at the batch size that the piece names."""
    chosen = [form for form in forms.FORMS if form.startswith("float32")]
    _measure(settings, int(piece.split()[-1]), chosen, False, emit)


def ours(settings: Settings, form: str, batch: int, name: str, *options: str) -> Contestant:
    """Return this project's training steps as a contestant."""
    speed = msgspec.json.encode(forms.FORMS[form]).decode()
    common = ("--batch", str(batch), "--width", str(settings.width), "--device", settings.device, "--speed", speed)
    return Contestant(name, name, "", Kind.OURS, (sys.executable, "-m", "tools.bench.steps", *common, *options))


def _measure(settings: Settings, batch: int, chosen: Iterable[str], peer: bool, emit: Callable[[AnyRow], None]) -> None:
    contestants = [ours(settings, form, batch, form) for form in chosen]
    if peer and not settings.dry:
        if installed("torchvision"):
            command = (sys.executable, "-m", "tools.bench.peers.torchvision", str(batch), settings.device)
            contestants.insert(0, Contestant(PEER, PEER, "", Kind.PEER, command))
        else:
            emit(Rate(f"{PEER}, {batch}", "this Python has no torchvision", PEER, batch, peer=True))

    def report(contestant: Contestant, rates: list[float]) -> None:
        is_peer = contestant.kind is Kind.PEER
        used = None if is_peer else share_used(settings, contestant.name, statistics.median(rates))
        emit(Rate(f"{contestant.name}, {batch}", "", contestant.title, batch, rates, used, is_peer))

    def failed(contestant: Contestant, why: str) -> None:
        peer_too = contestant.kind is Kind.PEER
        emit(Rate(f"{contestant.name}, {batch}", why, contestant.title, batch, peer=peer_too))

    for first in range(0, len(contestants), settings.together):
        group = contestants[first : first + settings.together]
        play(group, settings.rounds, settings.seconds, READY_S, report, failed)


def share_used(settings: Settings, form: str, images_per_s: float) -> float | None:
    """Return the share of the device's peak arithmetic that a rate uses (MFU), 0 to 1; None if the peak is unknown."""
    dtype = torch.bfloat16 if forms.FORMS[form].amp == "bf16" else torch.float32
    peak = peak_flops([torch.device(settings.device)], dtype)
    work = training_flops(Sizes.of(2, settings.width), CLASSES, IMAGE_SIDE_PX, "overlapping")
    return images_per_s * work / peak if peak else None
