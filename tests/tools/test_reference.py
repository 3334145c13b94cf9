"""The command-line reference docs/cli.md agrees with the commands."""

from __future__ import annotations

from pathlib import Path

import click
import pytest

from loader_service.cli import main
from tools.reference import reference

DOCUMENT = Path(__file__).parent.parent.parent / "docs" / "cli.md"


def test_it_is_up_to_date() -> None:
    """docs/cli.md equals the generated reference; if not, run: python -m tools.reference > docs/cli.md."""
    assert DOCUMENT.read_text(encoding="utf-8") == reference()


@pytest.mark.parametrize("name", sorted(main.commands))
def test_every_option_of_every_command_is_in_it(name: str) -> None:
    """Each public option has a row with its flag and environment variable in the section of its command."""
    section = DOCUMENT.read_text(encoding="utf-8").split(f"\n## {name}\n", 1)[1].split("\n## ", 1)[0]
    options = [p for p in main.commands[name].params if isinstance(p, click.Option) and not p.hidden]
    flags = {flag for option in options for flag in option.opts} - {"--config"}
    missing = {
        flag
        for flag in flags
        if f"| `{flag}" not in section
        or f"`LOADER_SERVICE_{name.upper()}_{flag.removeprefix('--').upper().replace('-', '_')}`" not in section
    }
    assert missing == set()
