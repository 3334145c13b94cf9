"""Training fed by a node on the same machine, as a share of the same training on one batch that stays on the device.

``trainer`` pieces measure steps with the trainer's own feed. ``slots`` pieces measure ``loader_service.torch.TensorLoader``,
which copies from pinned slots beside the computation, against the usual copy from pageable memory, and the stages of a step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional

from loader_service import Loader, LocalNode
from loader_service.torch import TensorBatch, TensorLoader
from tools.bench.contest import Contestant
from tools.gpu.measure import data
from tools.gpu.measure.forms import FORMS
from tools.gpu.measure.speed import READY_S, ours
from tools.gpu.measure.turns import play
from tools.gpu.parts import Settings
from tools.gpu.results import AnyRow, Fed
from trainer.model.alexnet import IMAGE_SIDE_PX, AlexNet
from trainer.optimizer import PaperSGD

SYNTHETIC: Final = "synthetic"
TRAINER: Final = "trainer's feed"
PINNED: Final = "pinned slots"
PAGEABLE: Final = "pageable memory"

NEXT, COPY, LAUNCH, DEVICE = "waiting for the node", "starting copies", "launching the step", "waiting for the device"
STAGES: Final = (NEXT, COPY, LAUNCH, DEVICE)

STEPS_BETWEEN_READINGS: Final = {"cpu": 1, "cuda": 20}
"""Steps between two synchronisations: a GPU must be idle when the time is read, but seldom, to stay busy."""

CLASSES: Final = 1000
GREY: Final = 120
"""Mean that is subtracted here: a grey level, so that only the path of the pixels differs between the forms."""

Batches = Iterator[tuple[Tensor, Tensor]]
"""Images (B, 224, 224, 3) uint8 and labels (B,) int64 on the device."""


def run(settings: Settings, piece: str, emit: Callable[[AnyRow], None]) -> None:
    """Measure what the piece names: ``trainer, raw, batch 128`` or ``slots, jpeg, batch 512``."""
    kind, codec, words = piece.split(", ")
    batch = int(words.split()[-1])
    if kind == "trainer":
        _trainer(settings, codec, batch, emit)
    else:
        _slots(settings, codec, batch, emit)


def _trainer(settings: Settings, codec: str, batch: int, emit: Callable[[AnyRow], None]) -> None:
    """Measure the trainer's own steps, fed and on noise, in turns."""
    folder = data.records(settings) / codec
    options = ("--data", str(folder), "--workers", str(settings.workers))
    contestants = [
        ours(settings, settings.form, batch, SYNTHETIC),
        ours(settings, settings.form, batch, TRAINER, *options),
    ]

    def row(contestant: Contestant, rates: list[float], problem: str = "") -> Fed:
        name = f"trainer, {contestant.name}, {codec}, {batch}"
        return Fed(name, problem, contestant.name, codec, batch, settings.form, settings.workers, rates)

    play(
        contestants,
        settings.rounds,
        settings.seconds,
        READY_S,
        lambda contestant, rates: emit(row(contestant, rates)),
        lambda contestant, why: emit(row(contestant, [], why)),
    )


def _slots(settings: Settings, codec: str, batch: int, emit: Callable[[AnyRow], None]) -> None:
    """Measure the paths of the product in turns: noise, pinned slots, pageable memory."""
    folder, device = data.records(settings) / codec, torch.device(settings.device)
    torch.manual_seed(0)
    step = _stepper(settings, device)
    rates: dict[str, list[float]] = {path: [] for path in (SYNTHETIC, PINNED, PAGEABLE)}
    with LocalNode(folder, settings.workers) as node:
        for _ in range(settings.rounds):
            for path, found in rates.items():
                clock = Clock(device)
                with _source(path, node.address, batch, device, clock) as batches:
                    _work(step, batches, 0.5 * settings.seconds, clock)  # uses up what was prefetched
                    found.append(_work(step, batches, settings.seconds, clock))
                waits = clock.shares() if path != SYNTHETIC else {}
                name = f"slots, {path}, {codec}, {batch}"
                emit(Fed(name, "", path, codec, batch, settings.form, settings.workers, list(found), waits))


class Clock:
    """Seconds of the training thread in each stage.

    Args:
        device: device that the thread waits for.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._spent_s = device, dict.fromkeys(STAGES, 0.0)

    def reset(self) -> None:
        """Start again from zero."""
        self._spent_s = dict.fromkeys(STAGES, 0.0)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count the block's time for a stage; a stage inside another one counts for itself only."""
        inside_s, start_s = sum(self._spent_s.values()), time.perf_counter()
        try:
            yield
        finally:
            others_s = sum(self._spent_s.values()) - inside_s
            self._spent_s[name] += time.perf_counter() - start_s - others_s

    def synchronise(self) -> None:
        """Wait until the device has done everything."""
        with self.stage(DEVICE):
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)

    def shares(self) -> dict[str, float]:
        """Return the share of each stage, 0 to 1."""
        total_s = sum(self._spent_s.values())
        return {name: spent_s / total_s for name, spent_s in self._spent_s.items()} if total_s else {}


class _Timed(Loader):
    """A loader that counts the time for each batch, also when a TensorLoader asks for it."""

    def __init__(self, clock: Clock, *args: Any, **options: Any) -> None:
        self._clock = clock
        super().__init__(*args, **options)

    def _fetch(self, lane: Any) -> Any:
        with self._clock.stage(NEXT):
            return super()._fetch(lane)


@contextmanager
def _source(path: str, address: str, batch: int, device: torch.device, clock: Clock) -> Iterator[Batches]:
    """Open one of the paths."""
    with ExitStack() as stack:
        if path == SYNTHETIC:
            yield _noise(batch, device)
            return
        loader = stack.enter_context(_Timed(clock, address, batch_size=batch, drop_last=True, timeout_s=60))
        if path == PINNED:
            yield _pinned(stack.enter_context(TensorLoader(loader, device)), clock)
        else:
            yield _pageable(loader, device, clock)


def _noise(batch: int, device: torch.device) -> Batches:
    images = torch.randint(0, 256, (batch, IMAGE_SIDE_PX, IMAGE_SIDE_PX, 3), dtype=torch.uint8).to(device)
    labels = torch.randint(0, CLASSES, (batch,)).to(device)
    while True:
        yield images, labels


def _pinned(batches: TensorLoader[TensorBatch], clock: Clock) -> Batches:
    stream = batches.all_epochs()
    while True:
        with clock.stage(COPY):
            batch = next(stream)
        yield batch.images, batch.labels


def _pageable(loader: Loader, device: torch.device, clock: Clock) -> Batches:
    for batch in loader.all_epochs():
        with clock.stage(COPY):
            images, labels = torch.from_numpy(batch.images).to(device), torch.from_numpy(batch.labels).to(device)
        yield images, labels


def _stepper(settings: Settings, device: torch.device) -> Callable[[Tensor, Tensor], None]:
    """Return a function that makes one training step on a batch on the device."""
    model = AlexNet(CLASSES, settings.width, devices=(device,), speed=FORMS[settings.form]).train()
    optimizer = PaperSGD(model, model.preset, lr=1e-4, fused=bool(model.speed.fused_sgd))

    def step(images: Tensor, labels: Tensor) -> None:
        optimizer.zero_grad()
        logits = model(images.permute(0, 3, 1, 2).float() - GREY)
        torch.autograd.backward(functional.cross_entropy(logits, labels))
        optimizer.step()

    return step


def _work(step: Callable[[Tensor, Tensor], None], batches: Batches, seconds: float, clock: Clock) -> float:
    """Train for ``seconds``; return images per second. The clock counts from the start of this call."""
    clock.synchronise()
    clock.reset()
    images, start_s = 0, time.perf_counter()
    while time.perf_counter() - start_s < seconds:
        for _ in range(STEPS_BETWEEN_READINGS[clock._device.type]):
            pixels, labels = next(batches)
            with clock.stage(LAUNCH):
                step(pixels, labels)
            images += len(labels)
        clock.synchronise()
    return images / (time.perf_counter() - start_s)
