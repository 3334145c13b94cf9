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


def test_a_refused_key_is_logged_once_and_then_counted() -> None:
    """The first refusal of a key has a line at once, all others of an interval together one, a quiet interval none."""
    lines, second = auth.RefusalLog(), auth.RefusalLog.INTERVAL_S
    (first,) = lines.add(auth.Refusal("K" * 40, "10.0.0.1"), 0.0)
    assert first == f"a client at 10.0.0.1 was refused: its key {'K' * 40} is not allowed"
    for number in range(1000):
        assert lines.add(auth.Refusal("K" * 40, f"10.0.0.{number % 9}"), 1.0) == []
    assert lines.due(second - 1) == []
    (count,) = lines.due(second)
    assert f"key {'K' * 40} were refused 1000 times more, the last at 10.0.0.0" in count
    assert lines.due(2 * second) == []
    assert lines.add(auth.Refusal("K" * 40, "10.0.0.1"), 3 * second) == [first]  # it had stopped, so it is news again


def test_made_up_keys_cannot_flood_the_log() -> None:
    """Thousands of keys have MAX_KEYS lines, one that says that more are only counted, and one count; nothing grows."""
    lines = auth.RefusalLog()
    said = [line for number in range(5000) for line in lines.add(auth.Refusal(f"{number:040}", "10.0.0.1"), 0.0)]
    assert len(said) == lines.MAX_KEYS + 1
    assert "more such keys are only counted" in said[-1]
    (count,) = lines.due(lines.INTERVAL_S)
    assert f"other keys were refused {5000 - lines.MAX_KEYS - 1} times more" in count
