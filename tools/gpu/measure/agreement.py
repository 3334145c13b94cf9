"""Losses, gradients and updates of each faster form, compared with the plain form on the same GPU.

Forms and layouts share weights, images, labels and dropout masks, so only rounding may differ.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from typing import Final

import msgspec
import torch
from torch import Tensor
from torch.nn import functional

from tools.gpu.measure.forms import FORMS, PLAIN
from tools.gpu.parts import Settings
from tools.gpu.results import Agreement, AnyRow
from trainer.model.alexnet import IMAGE_SIDE_PX, AlexNet
from trainer.model.rng import DropoutKey
from trainer.model.speed import Speed
from trainer.optimizer import PaperSGD
from trainer.parallel.exchange import Share

STEPS: Final = 3
"""Steps compared: the first records CUDA graphs, the others replay them; momentum acts from the second on."""

BATCH, DRY_BATCH = 32, 4
CLASSES: Final = 1000
LR: Final = 0.01


class Tolerance(msgspec.Struct, frozen=True):
    """Largest relative differences that count as rounding; fields as in ``Agreement``."""

    loss: float
    gradient: float
    worst: float
    update: float


FLOAT32: Final = Tolerance(loss=1e-4, gradient=1e-3, worst=2e-2, update=1e-2)
"""Measured on a CPU at full width with channels-last maps: 1e-7, 4e-5, 2e-3 (conv2: ReLUs of noise flip) and 3e-4."""

BFLOAT16: Final = Tolerance(loss=1e-2, gradient=6e-2, worst=0.5, update=6e-2)
"""Measured on a CPU at full width: 3e-4, 2e-2, 0.39 (conv1, through eight layers of rounding) and 2e-2."""

ROUNDING: Final = 2.0
"""A bfloat16 form may also differ so many times as much as the form with bfloat16 and nothing else: other sums, other
rounding, in narrow networks more than in wide ones."""


class Course(msgspec.Struct, frozen=True):
    """The results of a few training steps.

    Fields:
        losses: loss of each step.
        gradients: gradient of each parameter in the first step, by name, on the first device.
        updates: change of each parameter over all steps, by name, on the first device.
    """

    losses: list[float]
    gradients: dict[str, Tensor]
    updates: dict[str, Tensor]


class TwoStreams:
    """An exchange between towers that share a GPU but run on a stream each, as two GPUs would: towers overlap.

    Autograd runs each backward operation on the stream of its forward operation and orders the streams itself.

    Args:
        device: the GPU of both towers.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._streams = [torch.cuda.Stream(device=device) for _ in range(2)]  # type: ignore[no-untyped-call]

    def __call__(self, parts: Iterable[Tensor], readers: Sequence[int]) -> Iterator[Tensor]:
        """Give each reader the outputs of both towers; see ``trainer.parallel.exchange.Exchange``."""
        made, rest = [], iter(parts)
        for stream in self._streams:  # before any part is computed, or the second tower would wait for the first
            stream.wait_stream(torch.cuda.current_stream(self._device))  # images, weights and masks are made there
        for stream in self._streams:
            with torch.cuda.stream(stream):
                # The part is computed now, on this stream, with all that led to it since the last exchange.
                made.append((next(rest), stream.record_event()))
        for _ in readers:
            reading = torch.cuda.current_stream(self._device)
            for part, ready in made:
                reading.wait_event(ready)
                part.record_stream(reading)
            yield torch.cat([part for part, _ in made], dim=1)


def run(settings: Settings, piece: str, emit: Callable[[AnyRow], None]) -> None:
    """Compare the form and layout that the piece names."""
    form, _, layout = piece.partition(" @ ")
    plain = _plain(settings.device, settings.width, DRY_BATCH if settings.dry else BATCH)
    with strict():
        course = follow(network(FORMS[form], layout, settings), plain.images, plain.labels)
    narrow = FORMS[form].amp == "bf16"
    emit(compare(plain.course, course, form, layout, allowance(plain) if narrow else FLOAT32))


def allowance(plain: _Plain) -> Tolerance:
    """Return the tolerance of bfloat16 forms; see ``ROUNDING``."""
    own = compare(plain.course, plain.bf16, "", "", BFLOAT16)
    return Tolerance(
        **{name: max(value, ROUNDING * getattr(own, name)) for name, value in msgspec.structs.asdict(BFLOAT16).items()}
    )


class strict:  # noqa: N801 -- used as a function
    """A block in which float32 products are float32: with TF32, rounding would hide small mistakes."""

    def __enter__(self) -> None:
        matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
        self._before = matmul.allow_tf32, cudnn.allow_tf32
        matmul.allow_tf32 = cudnn.allow_tf32 = False

    def __exit__(self, *_: object) -> None:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = self._before


class _Plain(msgspec.Struct, frozen=True):
    images: Tensor
    labels: Tensor
    course: Course
    bf16: Course


@cache
def _plain(device: str, width: float, batch: int) -> _Plain:
    """Return noise, (batch, 3, 224, 224) float32 around 0, its labels, and the courses of the plain forms on it."""
    chance = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (batch, 3, IMAGE_SIDE_PX, IMAGE_SIDE_PX), generator=chance).float() - 120
    labels = torch.randint(0, CLASSES, (batch,), generator=chance)
    images, labels = images.to(device), labels.to(device)
    with strict():
        courses = [
            follow(AlexNet(CLASSES, width, devices=(device,), speed=speed), images, labels)
            for speed in (FORMS[PLAIN], msgspec.structs.replace(FORMS[PLAIN], amp="bf16"))
        ]
    return _Plain(images, labels, *courses)


def network(speed: Speed, layout: str, settings: Settings) -> AlexNet:
    """Return a network in one of the layouts ``one device``, ``two streams`` and ``two devices``."""
    width, device = settings.width, torch.device(settings.device)
    if layout == "two devices":
        return AlexNet(CLASSES, width, devices=("cuda:0", "cuda:1"), speed=speed)
    if layout == "two streams" and device.type == "cuda":
        return AlexNet(CLASSES, width, devices=(device,), speed=speed, share=Share((0, 1), TwoStreams(device)))
    return AlexNet(CLASSES, width, devices=(device,) * (2 if layout == "two streams" else 1), speed=speed)


def follow(model: AlexNet, images: Tensor, labels: Tensor) -> Course:
    """Train for STEPS steps on one batch.

    Args:
        model: a new network.
        images: (B, 3, 224, 224) float32 on the first device.
        labels: (B,) int64, likewise.
    """
    model.train()
    optimizer = PaperSGD(model, model.preset, lr=LR, fused=bool(model.speed.fused_sgd))
    named = dict(model.named_parameters())
    before = {name: value.detach().clone() for name, value in named.items()}
    losses, gradients = list[Tensor](), dict[str, Tensor]()
    for number in range(STEPS):
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(images, DropoutKey(0, number)), labels)
        torch.autograd.backward(loss)
        losses.append(loss.detach())
        if not number:
            gradients = {n: p.grad.detach().clone().to(images.device) for n, p in named.items() if p.grad is not None}
        optimizer.step()
    updates = {name: (value.detach() - before[name]).to(images.device) for name, value in named.items()}
    return Course([loss.item() for loss in losses], gradients, updates)


def compare(plain: Course, other: Course, form: str, layout: str, allowed: Tolerance) -> Agreement:
    """Return the differences between two courses; what is no number never agrees."""
    loss = max(abs(b - a) / abs(a) for a, b in zip(plain.losses, other.losses, strict=True))
    by_name = {name: _difference([g], [other.gradients[name]]) for name, g in plain.gradients.items()}
    # A parameter whose difference is no number comes first.
    where = max(by_name, key=lambda name: (math.isnan(by_name[name]), by_name[name]))
    gradient = _difference(list(plain.gradients.values()), [other.gradients[name] for name in plain.gradients])
    update = _difference(list(plain.updates.values()), [other.updates[name] for name in plain.updates])
    found = Tolerance(loss, gradient, by_name[where], update)
    return Agreement(
        f"{form} @ {layout}",
        form=form,
        layout=layout,
        loss=loss,
        gradient=gradient,
        worst=by_name[where],
        where=where,
        update=update,
        agrees=all(getattr(found, name) <= getattr(allowed, name) for name in Tolerance.__struct_fields__),
    )


def _difference(plain: list[Tensor], other: list[Tensor]) -> float:
    """Return the Euclidean norm of the difference, as a share of the plain one's."""
    squares = sum(float((b - a).double().square().sum()) for a, b in zip(plain, other, strict=True))
    whole = sum(float(a.double().square().sum()) for a in plain)
    return float((squares / max(whole, 1e-300)) ** 0.5)
