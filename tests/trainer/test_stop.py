"""Ctrl-C and SIGTERM between steps, during a wait, and twice."""

from __future__ import annotations

import signal

import pytest

from trainer.stop import Stopped, StopRequest


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_a_step_is_seen_after_it(number: signal.Signals) -> None:
    """A signal interrupts nothing; the next check raises Stopped."""
    with StopRequest() as stop:
        stop.check()
        signal.raise_signal(number)
        with pytest.raises(Stopped):
            stop.check()


def test_a_signal_ends_waiting_at_once() -> None:
    """A signal inside ``interruptible`` raises Stopped."""
    with StopRequest() as stop, pytest.raises(Stopped), stop.interruptible():
        signal.raise_signal(signal.SIGTERM)


def test_waiting_does_not_begin_after_a_signal() -> None:
    """An earlier signal prevents the wait."""
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Stopped), stop.interruptible():
            pytest.fail("must not wait")


def test_the_second_signal_meets_the_former_handler() -> None:
    """A second Ctrl-C kills a stuck process."""
    with StopRequest():
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_handlers_are_given_back() -> None:
    """The previous handlers are restored after the context."""
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with StopRequest():
        assert signal.getsignal(signal.SIGTERM) != before[0]
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
