"""The configuration refuses impossible values and names possible ones."""

from __future__ import annotations

import msgspec
import pytest

from trainer.config import RunConfig, Source
from trainer.errors import ConfigError


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"seed": -1}, "--seed=-1 cannot work: expected 0 to 9223372036854775807."),
        ({"lr": 0.0}, "--lr=0.0 cannot work: expected a number between 0 and 1."),
        ({"lr": float("nan")}, "--lr=nan cannot work: expected a number between 0 and 1."),
        ({"batch_size": 0}, "--batch-size=0 cannot work: expected 1 to 4096."),
        ({"epochs": 0}, "--epochs=0 cannot work: expected at least 1."),
        ({"log_every": 0}, "--log-every=0 cannot work: expected at least 1."),
        ({"checkpoint_every": -1}, "--checkpoint-every=-1 cannot work: expected at least 0."),
    ],
)
def test_impossible_values_are_named(fields: dict[str, object], sentence: str) -> None:
    """The error names the option, its value and the possible values, in one sentence."""
    with pytest.raises(ConfigError) as caught:
        RunConfig(**fields)
    assert str(caught.value) == sentence


def test_a_running_node_has_its_own_data() -> None:
    """--loader and --data exclude each other."""
    with pytest.raises(ConfigError, match="no --data together with --loader"):
        Source(loader="tcp://127.0.0.1:1", data="data")


def test_a_configuration_survives_json() -> None:
    """A configuration read from JSON equals the one that was written."""
    config = RunConfig(width=0.25, devices=("cpu", "cpu"), source=Source(data="elsewhere", workers=3))
    assert msgspec.json.decode(msgspec.json.encode(config), type=RunConfig) == config


def test_the_defaults_are_the_papers() -> None:
    """Defaults follow section 5: batches of 128, rate .01, 90 epochs, two towers at full width."""
    config = RunConfig()
    assert (config.batch_size, config.lr, config.epochs) == (128, 0.01, 90)
    assert (config.preset, config.towers, config.width) == ("paper", 2, 1.0)
