"""The trainer's benchmark: who competes, what a turn gives, and what the document says."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from tools.bench import trainer
from tools.bench.contest import Contestant, Running
from tools.bench.trainer import FORMS, Line, Settings, contestants, markdown, measure
from trainer.model.speed import Speed


def settings(**fields: object) -> Settings:
    plain = {"device": "cpu", "batches": (128,), "width": 1.0, "rounds": 3, "seconds": 1.0, "data": None, "workers": 1}
    return Settings(**(plain | fields))  # type: ignore[arg-type]


def test_every_switch_is_measured() -> None:
    """Each field of Speed is on in some form and off in another."""
    assert {
        name for name in Speed.__struct_fields__ if len({getattr(form, name) for form in FORMS.values()}) > 1
    } == set(Speed.__struct_fields__)


def test_a_cpu_has_no_graphs_and_a_peer_runs_in_its_own_python() -> None:
    """What cannot run is not started; the node feeds the fastest form."""
    here = contestants(settings(data=Path("data")), 4, Path("peer/python"))
    assert not any(speed.cuda_graphs for _, speed in here if speed)
    assert len(contestants(settings(device="cuda"), 4, None)) == len(FORMS)
    *_, (fed, _), (peer, form) = here
    assert "--data" in fed.command
    assert peer.command[0] == "peer/python"
    assert form is None


def test_a_turn_makes_whole_steps() -> None:
    """A contestant as the benchmark starts it, at a tiny width: images are counted in whole batches."""
    wanted = settings(width=0.05)
    speed = Speed(amp="bf16", fused_norm=True)
    (plain, _), *_ = contestants(wanted, 2, None)
    command = (*plain.command[:-1], msgspec.json.encode(speed).decode())
    with Running(Contestant("tiny", "tiny", "", "ours", command), {"OMP_NUM_THREADS": "1"}) as running:
        running.wait()
        assert running.turn(0, 0.2).images_per_s > 0


def line(title: str, rate: float, used: float | None = None) -> Line:
    return Line(title, 128, [rate * 0.9, rate, rate * 1.3], used)


def test_the_document_compares_with_peer_and_node() -> None:
    """The fastest form beside torchvision, and the node's share of the form that it feeds; medians, whatever the order."""
    lines = [line("bf16", 1000, 0.25), line("float32", 400), line("bf16, fed by a node", 985)]
    text = markdown(settings(), [*lines, line("torchvision's AlexNet, bf16, compiled", 800)], "torch 2", [])
    assert "| bf16 | 128 | 1,000 [900, 1,300] | 25.0% |" in text
    assert "batch 128: 1.25 times torchvision's, by bf16." in text
    assert "batch 128: fed by a node 98.5% of synthetic; the target is 98%." in text
    assert "H100" not in text


def test_a_missing_peer_is_said() -> None:
    """The document tells why it has no comparison, once for all batch sizes."""
    why = "torchvision does not install here: no."
    text = markdown(settings(), [line("bf16", 1000)], "torch 2", [why, why])
    assert text.endswith(f"\n\nNot measured: {why}\n")
    assert text.count(why) == 1


def test_a_peer_that_does_not_run_is_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others' figures are not lost with it."""
    monkeypatch.setattr(trainer, "FORMS", {"float32": Speed()})
    missing: list[str] = []
    lines = measure(settings(width=0.05, rounds=1, seconds=0.1), 1, Path("/bin/false"), missing)
    assert "torchvision" in missing[0]
    assert [found.title for found in lines] == ["float32"]
