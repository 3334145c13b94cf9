"""Options take values from flag, environment, file and default; errors in a configuration file are named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from loader_service.cli.options import CONFIG_FILE, VARIABLES, Command, Group, argument, hidden_option, option

Run = Callable[..., Result]


@click.command(cls=Command)
@argument("address", default="nowhere")
@option("--workers", type=click.IntRange(1, 8), default=1)
@option("--log-format", default="text")
@option("--insecure", is_flag=True)
@hidden_option("--parent", type=int)
def serve(**options: object) -> None:
    """Print the values of all options."""
    click.echo(" ".join(f"{name}={value}" for name, value in sorted(options.items())))


@click.group(cls=Group, context_settings={"auto_envvar_prefix": VARIABLES})
def group() -> None:
    """A group of commands with the same classes as loader-service."""


group.add_command(serve)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """``run(*arguments, config="...", **environment)``: run ``serve`` in a folder with that loader-service.toml."""
    monkeypatch.chdir(tmp_path)

    def invoke(*arguments: str, config: str | None = None, **environment: str) -> Result:
        if config is not None:
            CONFIG_FILE.write_text(config, encoding="utf-8")
        variables = {f"{VARIABLES}_{name}": value for name, value in environment.items()}
        return CliRunner().invoke(group, ["serve", *arguments], env=variables)

    return invoke


def test_flag_before_variable_before_file_before_default(run: Run) -> None:
    """A flag overrides the variable, the variable overrides the file, the file overrides the default."""
    config = "[serve]\nworkers = 2\n"
    assert "workers=1" in run().output
    assert "workers=2" in run(config=config).output
    assert "workers=3" in run(config=config, SERVE_WORKERS="3").output
    assert "workers=4" in run("--workers", "4", config=config, SERVE_WORKERS="3").output


def test_arguments_and_switches_likewise(run: Run) -> None:
    """Arguments and switches can be set by a variable or a key, like options with values."""
    config = '[serve]\naddress = "file"\ninsecure = true\nlog-format = "json"\n'
    assert run(config=config).output == "address=file insecure=True log_format=json parent=None workers=1\n"
    assert "address=variable insecure=False" in run(config=config, SERVE_ADDRESS="variable", SERVE_INSECURE="0").output
    assert "address=here" in run("here", config=config, SERVE_ADDRESS="variable").output


def test_another_file(run: Run, tmp_path: Path) -> None:
    """If --config or its variable names a file, the file in the working directory is not read."""
    other = tmp_path / "other.toml"
    other.write_text("[serve]\nworkers = 5\n", encoding="utf-8")
    broken = "this is no TOML"
    assert "workers=5" in run("--config", str(other), config=broken).output
    assert "workers=5" in run(config=broken, CONFIG=str(other)).output
    assert "workers=1" in run("--config", "/dev/null", config=broken).output


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ("[serve]\nwrokers = 2", "loader-service.toml: [serve] wrokers=2 cannot work: expected one of the options of"),
        ("[serve]\nparent = 2", "[serve] parent=2 cannot work"),
        ("[serve]\nworkers = 9", "[serve] workers=9 cannot work"),
        ('[serve]\nworkers = "many"', "[serve] workers='many' cannot work"),
        ("[serve]\nworkers = [1]", "expected a string, a number, true or false"),
        (
            "[sevre]\nworkers = 2",
            "loader-service.toml: sevre={'workers': 2} cannot work: expected a table of a command",
        ),
        ("workers = 2", "loader-service.toml: workers=2 cannot work"),
        ("serve = 2", "expected a table, [serve]"),
        ("[serve", "--config='loader-service.toml' cannot work: expected TOML"),
    ],
)
def test_errors_in_the_file_are_named(run: Run, config: str, sentence: str) -> None:
    """An error names file, table and key and ends with exit code 2, never with a traceback."""
    done = run(config=config)
    assert done.exit_code == 2
    assert sentence in done.output
    assert isinstance(done.exception, SystemExit)


def test_a_file_that_is_not_there(run: Run) -> None:
    """A named file that cannot be read is an error."""
    done = run("--config", "gone.toml")
    assert done.exit_code == 2
    assert "expected a file that can be read (No such file or directory)" in done.output


def test_hidden_options_have_no_variable(run: Run) -> None:
    """Hidden options, which a starter passes to its node, ignore the environment."""
    assert "parent=None" in run(SERVE_PARENT="1").output
