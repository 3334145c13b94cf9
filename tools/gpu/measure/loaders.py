"""This service on all cores beside PyTorch's DataLoader, and FFCV and DALI where this Python has them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Final

from tools.bench.contest import Contestant, Kind
from tools.bench.contestants import FORMS
from tools.gpu.measure import data
from tools.gpu.measure.turns import play
from tools.gpu.parts import Settings, installed
from tools.gpu.results import AnyRow, Loading

READY_S: Final = 60.0

MODULES: Final = {"dataloader": "torch", "ffcv": "ffcv", "dali": "nvidia.dali"}
"""The module that shows that a peer is installed."""

DALI_GPU: Final = ("jpeg-gpu", "DALI (GPU), JPEG files")
DRY_FORMS: Final = ("raw",)


def run(settings: Settings, piece: str, emit: Callable[[AnyRow], None]) -> None:
    """Measure every loader with as many workers as the piece names."""
    workers, folder = int(piece.split()[0]), data.records(settings)
    contestants = [
        Contestant(
            f"ours-{codec}",
            f"this project, shared memory, {codec}",
            codec,
            Kind.OURS,
            (sys.executable, "-m", "tools.bench.ours", str(folder / codec), "--workers", str(workers)),
        )
        for codec in (DRY_FORMS if settings.dry else ("raw", "jpeg"))
    ]
    for peer, module in MODULES.items():
        if not installed(module):
            name = f"{peer}, {workers}"
            emit(Loading(name, f"this Python has no module {module}", peer, "", workers))
            continue
        titles = dict(FORMS[peer]) | (dict([DALI_GPU]) if peer == "dali" and settings.gpus else {})
        for form, title in titles.items():
            if settings.dry and form not in DRY_FORMS:
                continue
            command = (sys.executable, "-m", f"tools.bench.peers.{peer}", form, str(folder), str(workers))
            codec = "raw" if form == "raw" else "jpeg"
            contestants.append(Contestant(f"{peer}-{form}", title, codec, Kind.PEER, command))

    def row(contestant: Contestant, rates: list[float], problem: str = "") -> Loading:
        return Loading(
            f"{contestant.name}, {workers}", problem, contestant.title, contestant.codec, workers, images_per_s=rates
        )

    play(
        contestants,
        settings.rounds,
        settings.seconds,
        READY_S,
        lambda contestant, rates: emit(row(contestant, rates)),
        lambda contestant, why: emit(row(contestant, [], why)),
    )
