"""The ways for towers to meet give the same numbers, forward and backward."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from trainer.parallel import exchange
from trainer.parallel.exchange import BetweenDevices, OneDevice, choose_exchange, peer_copies_work

CPU = torch.device("cpu")


def parts() -> list[torch.Tensor]:
    return [torch.arange(6.0).view(2, 3).requires_grad_(), torch.arange(6.0, 12.0).view(2, 3).requires_grad_()]


@pytest.mark.parametrize("meet", [OneDevice(), BetweenDevices((CPU, CPU))], ids=["one", "two"])
def test_each_reader_gets_all_towers_in_order(meet: exchange.Exchange) -> None:
    """Side by side in the order of the towers, for each reader that asked."""
    left, right = parts()
    wholes = list(meet([left, right], (0, 1)))
    assert len(wholes) == 2
    for whole in wholes:
        assert torch.equal(whole, torch.tensor([[0.0, 1, 2, 6, 7, 8], [3, 4, 5, 9, 10, 11]]))
    assert len(list(meet([left, right], (0,)))) == 1


@pytest.mark.parametrize("meet", [OneDevice(), BetweenDevices((CPU, CPU))], ids=["one", "two"])
def test_gradients_of_all_readers_add_up(meet: exchange.Exchange) -> None:
    """Each tower's gradient is the sum of what both readers send back."""
    left, right = parts()
    first, second = meet([left, right], (0, 1))
    (first.sum() + (second * torch.arange(6.0)).sum()).backward()
    assert torch.equal(left.grad, torch.tensor([[1.0, 2, 3]] * 2))
    assert torch.equal(right.grad, torch.tensor([[4.0, 5, 6]] * 2))


def test_the_form_follows_the_devices() -> None:
    """One entry puts all towers on it; two give each tower its own, even if they are the same."""
    assert isinstance(choose_exchange((CPU,)), OneDevice)
    assert isinstance(choose_exchange((CPU, CPU)), BetweenDevices)


def test_damaged_peer_copies_go_through_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose copies between devices arrive damaged is said so once, and the numbers stay right."""
    monkeypatch.setattr(exchange, "peer_copies_work", lambda devices: False)
    with pytest.warns(UserWarning, match="through host memory"):
        meet = BetweenDevices((CPU, CPU))
    left, right = parts()
    assert torch.equal(next(meet([left, right], (1,))), next(OneDevice()([left, right], (0,))))


def test_one_device_twice_needs_no_probe() -> None:
    """Nothing is copied between a device and itself."""
    assert peer_copies_work((CPU, CPU))


@pytest.mark.parametrize("damage", [torch.zeros_like, lambda sent: sent.roll(1)], ids=["zeros", "garbage"])
def test_damaged_copies_are_noticed(monkeypatch: pytest.MonkeyPatch, damage: Callable[[Tensor], Tensor]) -> None:
    """Copies that arrive as zeros, or as other numbers, without any error; here between two names of the CPU."""
    devices = (CPU, torch.device("cpu", 0))
    assert peer_copies_work(devices)
    whole = Tensor.to
    monkeypatch.setattr(Tensor, "to", lambda sent, target: damage(whole(sent, target)))
    assert not peer_copies_work(devices)
