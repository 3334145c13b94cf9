"""The trainer's benchmark: contestants, turns and the document."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from tools.bench import trainer
from tools.bench.contest import Contestant, Kind, Running
from tools.bench.trainer import FORMS, Measurement, Role, Settings, contestants, markdown, measure
from trainer.model.speed import Speed


def settings(**fields: object) -> Settings:
    """Return the settings of a small run, some fields replaced."""
    plain = {"device": "cpu", "batches": (128,), "width": 1.0, "rounds": 3, "seconds": 1.0, "data": None, "workers": 1}
    return Settings(**(plain | fields))  # type: ignore[arg-type]


def test_every_option_is_measured() -> None:
    """Each field of Speed is on in some form and off in another."""
    assert {
        name for name in Speed.__struct_fields__ if len({getattr(form, name) for form in FORMS.values()}) > 1
    } == set(Speed.__struct_fields__)


def test_a_cpu_has_no_graphs_and_a_peer_runs_in_its_own_python() -> None:
    """CUDA graphs need a GPU; a node feeds the last form, which has every option of this device."""
    here = contestants(settings(data=Path("data")), 4, Path("peer/python"))
    assert not any(speed.cuda_graphs for _, speed in here if speed)
    assert len(contestants(settings(device="cuda"), 4, None)) == len(FORMS)
    *_, (fed, _), (peer, form) = here
    assert "--data" in fed.command
    assert peer.command[0] == "peer/python"
    assert form is None


def test_a_turn_makes_whole_steps() -> None:
    """A contestant as the benchmark starts it, at a tiny width, delivers images."""
    wanted = settings(width=0.05)
    speed = Speed(amp="bf16", fused_norm=True)
    (plain, _), *_ = contestants(wanted, 2, None)
    command = (*plain.command[:-1], msgspec.json.encode(speed).decode())
    with Running(Contestant("tiny", "tiny", "", Kind.OURS, command), {"OMP_NUM_THREADS": "1"}) as running:
        running.wait()
        assert running.turn(0, 0.2).images_per_s > 0


def measured(title: str, rate: float, used: float | None = None, role: Role = Role.SYNTHETIC) -> Measurement:
    """Three rounds around a rate, at batch 128."""
    return Measurement(title, role, 128, [rate * 0.9, rate, rate * 1.3], used)


def test_the_document_compares_with_peer_and_node() -> None:
    """The fastest form is compared with torchvision, and a fed form with its synthetic one, by their medians."""
    lines = [measured("bf16", 1000, 0.25), measured("float32", 400)]
    lines.append(measured("bf16, fed by a node", 985, role=Role.FED))
    lines.append(measured("torchvision's AlexNet, bf16, compiled", 800, role=Role.PEER))
    text = markdown(settings(), lines, "torch 2", [])
    assert "| bf16 | 128 | 1,000 [900, 1,300] | 25.0% |" in text
    assert "batch 128: 1.25 times torchvision's, by bf16." in text
    assert "batch 128: fed by a node 98.5% of synthetic; the target is 98%." in text
    assert "H100" not in text


def test_a_missing_peer_is_explained() -> None:
    """The document gives the reason once for all batch sizes."""
    why = "torchvision does not install here: no."
    text = markdown(settings(), [measured("bf16", 1000)], "torch 2", [why, why])
    assert text.endswith(f"\n\nNot measured: {why}\n")
    assert text.count(why) == 1


def test_a_peer_that_does_not_run_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other contestants' figures are kept."""
    monkeypatch.setattr(trainer, "FORMS", {"float32": Speed()})
    missing: list[str] = []
    lines = measure(settings(width=0.05, rounds=1, seconds=0.1), 1, Path("/bin/false"), missing)
    assert "torchvision" in missing[0]
    assert [found.title for found in lines] == ["float32"]
