"""The choice between a segment's fast and plain forms."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from trainer.model.segment import TowerSegment
from trainer.model.speed import Speed

CPU = torch.device("cpu")


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Return the shapes of recorded graphs; a graph of this fixture adds 1000 to its result."""
    shapes: list[tuple[int, ...]] = []

    def record(run: nn.Module, like: tuple[Tensor, ...]) -> Callable[..., Tensor]:
        shapes.append(tuple(like[0].shape))
        assert len(list(run.parameters())) == 2  # torch finds no others to record
        return lambda *given: run(*given) + 1000

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", record)
    return shapes


def linear(speed: Speed) -> TowerSegment:
    layer = nn.Linear(3, 2)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return TowerSegment(layer, [layer], speed, CPU)


def test_full_batches_in_training_take_the_graph(recorded: list[tuple[int, ...]]) -> None:
    """A graph is recorded for the first batch; short batches and those without gradients do not use it."""
    segment = linear(Speed(cuda_graphs=True))
    assert segment(torch.zeros(4, 3)).mean() == 1000
    assert segment(torch.zeros(4, 3)).mean() == 1000
    assert segment(torch.zeros(2, 3)).mean() == 0
    with torch.inference_mode():
        assert segment(torch.zeros(4, 3)).mean() == 0
    assert recorded == [(4, 3)]


def test_a_larger_batch_takes_the_graphs_place(recorded: list[tuple[int, ...]]) -> None:
    """A run that resumes with a short batch still gets a graph for full ones."""
    segment = linear(Speed(cuda_graphs=True))
    segment(torch.zeros(2, 3))
    assert segment(torch.zeros(4, 3)).mean() == 1000
    assert segment(torch.zeros(2, 3)).mean() == 0
    assert recorded == [(2, 3), (4, 3)]


def test_bfloat16_is_in_the_plain_form_too(recorded: list[tuple[int, ...]]) -> None:
    """Short and full batches compute in bfloat16; the weights stay float32."""
    layer = nn.Linear(3, 2)
    segment = TowerSegment(layer, [layer], Speed(amp="bf16"), CPU)
    assert segment(torch.zeros(2, 3)).dtype == torch.bfloat16
    with torch.inference_mode():
        assert segment(torch.zeros(4, 3)).dtype == torch.bfloat16
    segment(torch.ones(4, 3)).sum().backward()
    assert layer.weight.dtype == layer.weight.grad.dtype == torch.float32
    assert recorded == []


def test_full_batches_in_training_take_the_compiled_form(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short batches and those without gradients cost no compilation."""
    monkeypatch.setattr(torch, "compile", lambda run, dynamic: lambda *given: run(*given) + 1000)
    segment = linear(Speed(compile=True))
    assert segment(torch.zeros(4, 3)).mean() == 1000
    assert segment(torch.zeros(2, 3)).mean() == 0
    with torch.inference_mode():
        assert segment(torch.zeros(4, 3)).mean() == 0
