"""A training step queues its work and waits for no result.

On a GPU a wait leaves the device idle, and CUDA graphs cannot record it. Here, on a CPU, two modes of torch watch the step:
one for calls of torch's functions from Python, one for the operations below them. They refuse every way for a number to
pass between host and device. Crops, windows, labels and dropout masks are on the device before the step, as a TensorLoader
brings them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from trainer.data import normalisation
from trainer.data.feed import DeviceBatch
from trainer.data.normalisation import MeanSubtraction, Windows
from trainer.evaluation.scores import ScoreCounter
from trainer.model import dropout
from trainer.model.alexnet import AlexNet
from trainer.model.dropout import MaskPlan
from trainer.model.lrn import local_response_norm
from trainer.model.rng import DropoutKey
from trainer.model.speed import Speed
from trainer.optimizer import PaperSGD
from trainer.parallel.world import World
from trainer.run.param_stats import measure
from trainer.run.progress import Meter, Tally

CPU = torch.device("cpu")

TO_HOST = {"item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__", "is_nonzero"}
FROM_HOST = {"tensor", "as_tensor", "new_tensor"}
"""Functions of torch that copy between host and device, if the tensor is on one."""

SIZED_BY_VALUES = {"_local_scalar_dense", "nonzero", "masked_select", "bincount", "_unique2", "equal"}
"""Operations whose result, or its size, the host needs: they wait for the device."""


class Calls(TorchFunctionMode):
    """Note calls that copy between host and device."""

    def __init__(self, seen: list[str]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        if name in TO_HOST | FROM_HOST:
            self.seen.append(name)
        return function(*args, **(kwargs or {}))


class Operations(TorchDispatchMode):
    """Note operations that wait for a value, and boolean indices, which become numbers of places."""

    def __init__(self, seen: list[str]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = operation.overloadpacket.__name__
        masks = name in {"index", "index_put_"} and any(i is not None and i.dtype == torch.bool for i in args[1])
        if name in SIZED_BY_VALUES or masks:
            self.seen.append(name)
        return operation(*args, **(kwargs or {}))


@contextmanager
def watched() -> Iterator[list[str]]:
    """Yield the list of what has waited so far."""
    seen: list[str] = []
    with Calls(seen), Operations(seen):
        yield seen


def arrived(model: AlexNet, key: DropoutKey, device: torch.device) -> DeviceBatch:
    """Return a batch whose arrays are all on the device."""
    plan = MaskPlan(key, model.dropout_units())
    images = torch.randint(0, 256, (4, 224, 224, 3), dtype=torch.uint8).to(device)
    y, x, flip = torch.tensor([0, 5, 9, 32]), torch.tensor([3, 0, 32, 7]), torch.tensor([True, False, True, False])
    masks = plan.drawn(0, 4, [torch.from_numpy(plan.draw(0, 4)).to(device)])
    labels = torch.tensor([0, 1, 2, 0]).to(device)
    return DeviceBatch((images,), (Windows(y, x, flip).to(device),), labels, labels, epoch=0, views=1, masks=masks)


def stepper(speed: Speed, device: torch.device = CPU) -> Callable[[], None]:
    """Return a function that makes a training step, from pixels on the device to new weights."""
    model = AlexNet(3, 0.05, devices=(device,), speed=speed).train()
    optimizer = PaperSGD(model, model.preset, 0.01, bool(model.speed.fused_sgd))
    subtract_mean = MeanSubtraction(torch.full((256, 256, 3), 120.0), model.preset, (device,))
    key = DropoutKey(seed=1, step=0)
    batch = arrived(model, key, device)
    meter = Meter(device, Tally())

    def step() -> None:
        optimizer.zero_grad()
        logits = model(subtract_mean(batch.images, batch.windows), batch.dropout(key))
        loss = functional.cross_entropy(logits, batch.labels)
        torch.autograd.backward(loss * 0.5)
        meter.add(loss, logits, batch.labels)
        optimizer.step()

    return step


FORMS = {
    "default": Speed(),
    "plain": Speed(channels_last=False, fused_sgd=False),
    "bf16": Speed(amp="bf16"),
    "fused-norm": Speed(fused_norm=True),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_step_waits_for_nothing(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mean, masks, forward, backward, update and sums of the log copy nothing between host and device."""
    # A CPU subtracts the mean by a loop of its own, which reads the windows; watched is the form for GPUs.
    monkeypatch.setattr(normalisation, "subtract_by_loop", normalisation.subtract_at_once)
    step = stepper(FORMS[form])
    step()  # the first step makes what later ones use again
    # The modes do not see from_numpy, by which a step's own masks would come.
    monkeypatch.setattr(dropout, "dropout_bits", lambda *_, **__: pytest.fail("masks drawn on the host"))
    with watched() as seen:
        step()
    assert seen == []


def test_waits_are_found() -> None:
    """The modes see each way to wait."""
    tensor = torch.arange(3.0)
    with watched() as seen:
        tensor.sum().item()
        tensor.new_tensor(2.0)
        tensor[tensor > 1]
        if tensor[0] > 1:
            tensor.tolist()
        torch.bincount(tensor.long())
    assert {"item", "_local_scalar_dense", "new_tensor", "index", "__bool__", "bincount"} <= set(seen)


def test_the_band_of_the_lrn_is_made_once() -> None:
    """The second pass through LRN makes no matrix again, also if the first one was a validation."""
    made: list[str] = []

    class Made(TorchDispatchMode):
        def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if "arange" in operation.overloadpacket.__name__:
                made.append("arange")
            return operation(*args, **(kwargs or {}))

    maps = torch.randn(1, 11, 2, 2)
    with torch.inference_mode():
        local_response_norm(maps)
    with Made():
        local_response_norm(maps.requires_grad_()).sum().backward()
    assert made == []


def test_an_evaluation_waits_once() -> None:
    """Batches are counted without a wait, and the counts travel together."""
    counter = ScoreCounter()
    probabilities, labels = torch.rand(8, 7), torch.arange(8) % 7
    with watched() as seen:
        counter.add(probabilities, labels)
        counter.add(probabilities, labels)
        assert seen == []
        assert counter.evaluation(None).images == 16
    assert seen == ["tolist"]


def test_parameter_statistics_wait_once() -> None:
    """The statistics of all weights and buffers travel together."""
    model = AlexNet(3, 0.05)
    optimizer = PaperSGD(model, model.preset, 0.01)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    with watched() as seen:
        assert len(measure(model, optimizer, World((CPU,)))) == 30
    assert seen == ["tolist"]


@pytest.mark.gpu
@pytest.mark.parametrize("form", [*FORMS, "graphs"])
def test_a_step_on_a_gpu_waits_for_nothing(form: str) -> None:
    """The driver reports no wait of the host in a step."""
    step = stepper(FORMS.get(form, Speed(cuda_graphs=True)), torch.device("cuda", 0))
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_statistics_of_scores_are_right_on_any_layout() -> None:
    """Counts by addition at indices equal those of a loop."""
    probabilities, labels = torch.rand(50, 8, generator=torch.Generator().manual_seed(0)), torch.arange(50) % 8
    counter = ScoreCounter()
    counter.add(probabilities, labels)
    result = counter.evaluation(None)
    expected: list[list[int]] = [[0] * 8 for _ in range(8)]
    missed = [0] * 8
    for row, label in zip(probabilities.tolist(), labels.tolist(), strict=True):
        best = sorted(range(8), key=lambda guess: -row[guess])[:5]
        expected[label][best[0]] += 1
        missed[label] += label not in best
    assert (result.confusion, result.top5_missed) == (expected, missed)
