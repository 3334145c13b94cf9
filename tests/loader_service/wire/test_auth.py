"""Key files: their modes, and the checks when they are read."""

from __future__ import annotations

from pathlib import Path

import pytest

from loader_service.errors import KeyFileError, OptionError
from loader_service.wire import auth


def test_made_keys_can_be_read(tmp_path: Path) -> None:
    """The keys of a node and a client fit together, and only their owner can read the secret ones."""
    made = auth.generate(tmp_path)
    assert {path.relative_to(tmp_path).as_posix() for path in made} == {
        "node.secret", "node.key", "client.secret", "allowed/client.key",
    }  # fmt: skip
    assert [path.stat().st_mode & 0o777 for path in (tmp_path / "node.secret", tmp_path / "client.secret")] == [
        0o600
    ] * 2
    node = auth.node_keys(tmp_path)
    client = auth.client_keys(tmp_path / "node.key", tmp_path / "client.secret")
    assert len(node.allowed) == 1
    assert len(client.node) == len(node.secret) == auth.KEY_CHARACTERS
    assert auth.client_keys(client.node.decode(), tmp_path / "client.secret") == client


def test_existing_keys_are_not_overwritten(tmp_path: Path) -> None:
    """A second keygen in the same directory fails and changes no file."""
    auth.generate(tmp_path)
    before = (tmp_path / "node.secret").read_text()
    with pytest.raises(KeyFileError, match="File exists"):
        auth.generate(tmp_path)
    assert (tmp_path / "node.secret").read_text() == before


def test_bad_key_files_are_named(tmp_path: Path) -> None:
    """A missing file, a malformed one, a secret that others can read, and an empty list each have an error of their own."""
    auth.generate(tmp_path)
    secret = tmp_path / "client.secret"
    (tmp_path / "short").write_text("abc\n")
    (tmp_path / "empty").write_text("# nothing\n")
    for name, sentence in (("none", "cannot be read"), ("short", "not a key of 40"), ("empty", "one line with a key")):
        with pytest.raises(KeyFileError, match=sentence):
            auth.client_keys(tmp_path / name, secret)
    secret.chmod(0o644)
    with pytest.raises(KeyFileError, match="chmod 600"):
        auth.client_keys(tmp_path / "node.key", secret)
    (tmp_path / "allowed" / "client.key").unlink()
    with pytest.raises(KeyFileError, match="nobody could connect"):
        auth.node_keys(tmp_path)


def test_both_keys_or_none() -> None:
    """An error names the key that is missing."""
    assert auth.chosen_keys(None, None) is None
    with pytest.raises(OptionError, match="server_key=None"):
        auth.chosen_keys(None, "client.secret")
    with pytest.raises(OptionError, match="client_key=None"):
        auth.chosen_keys("node.key", None)
