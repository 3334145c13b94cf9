"""What is said to Docker, what is believed of its answers, and that nothing of a project stays behind."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tools.containers.compose import Compose
from tools.errors import ToolFailed

Answer = Callable[..., None]
Asked = Callable[[], list[list[str]]]

STATUS = '{"clients": [{"transport": "shm"}], "workers": [{"samples": 30}, {"samples": 12}], "more": 1}'
DOWN = ["down", "--volumes", "--remove-orphans", "--timeout", "10"]


def test_without_compose_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No program, no traceback."""
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ToolFailed, match="install Docker with Compose"):
        Compose()


def test_without_an_engine_it_says_so(answer: Answer) -> None:
    """Compose answers, but `docker version` reaches no engine."""
    answer("version", code=1)
    answer("compose version")
    with pytest.raises(ToolFailed, match="no Docker engine answers"):
        Compose()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_a_project_is_taken_away_whatever_ends_it(asked: Asked, error: type[BaseException]) -> None:
    """Before the block what a killed run has left, and after it the block's own, of this project and no other."""
    with pytest.raises(error), Compose("mine"):
        raise error
    downs = [words for words in asked() if words[-5:] == DOWN]
    assert len(downs) == 2
    assert all(words[words.index("--project-name") + 1] == "mine" for words in downs)


def test_a_failed_command_is_named(answer: Answer) -> None:
    """The sentence has the command as a person would type it, and its exit code."""
    answer("up", code=17)
    with pytest.raises(ToolFailed, match=r"`docker compose .* up --detach loader` ended with exit code 17"):
        Compose().run("up", "--detach", "loader")


def test_lines_are_read_up_to_the_one_that_is_waited_for(answer: Answer, capsys: pytest.CaptureFixture[str]) -> None:
    """What is waited for is found once, in order, and every line is passed on."""
    answer("logs --follow", "one\ntwo\nthree\n")
    answer("{{.ExitCode}}", "0\n")
    compose = Compose()
    with compose.follow("trainer") as lines:
        lines.until(re.compile("two"), "it said two")
        assert "three" not in capsys.readouterr().out
        lines.finish()
    assert capsys.readouterr().out.startswith("three\n")


def test_a_service_that_ends_too_early_is_an_error(answer: Answer) -> None:
    """It may have done all it had to do: what was waited for was not there."""
    answer("logs --follow", "one\n")
    answer("{{.ExitCode}}", "0\n")
    with (
        Compose().follow("trainer") as lines,
        pytest.raises(ToolFailed, match="ended before it said two; its lines are above"),
    ):
        lines.until(re.compile("two"), "it said two")


def test_a_service_that_fails_fails_the_run(answer: Answer) -> None:
    """Its exit code is asked for when its lines have ended."""
    answer("logs --follow", "one\n")
    answer("{{.ExitCode}}", "3\n")
    with Compose().follow("trainer") as lines, pytest.raises(ToolFailed, match="trainer ended with exit code 3"):
        lines.finish()


def test_a_status_is_read_from_the_loaders_own_container(answer: Answer) -> None:
    """`loader-service status --json`, of the container with that number."""
    answer("exec -T --index 2 loader loader-service status --json", STATUS)
    status = Compose().status(2)
    assert [client.transport for client in status.clients] == ["shm"]
    assert status.samples == 42


def test_a_status_that_is_none_is_refused(answer: Answer) -> None:
    """What a container prints is not believed unchecked."""
    answer("status --json", '{"clients": 5}')
    with pytest.raises(ToolFailed, match="`loader-service status --json` printed is not what"):
        Compose().status(1)


def test_running_containers_are_known_by_their_numbers(answer: Answer, asked: Asked) -> None:
    """A container's name ends in its number, whatever else it has; the killed ones are named one by one."""
    answer("ps", "mine-loader-2\nmine-loader-11\n")
    compose = Compose("mine")
    assert compose.indices("loader") == {2, 11}
    compose.destroy("loader", 2, 11)
    assert asked()[-1] == ["rm", "--force", "mine-loader-2", "mine-loader-11"]


def test_a_metric_is_one_number(answer: Answer) -> None:
    """Prometheus answers with series; one that it does not know is 0, and rubbish is refused."""
    compose = Compose()
    answer("promtool", '[{"metric":{},"value":[1795470734.626,"14880"]}]')
    assert compose.metric("sum(x)") == 14880
    answer("promtool", "[]")
    assert compose.metric("sum(x)") == 0
    answer("promtool", '{"status": "error"}')
    with pytest.raises(ToolFailed, match="Prometheus's answer is not what"):
        compose.metric("sum(x)")


def test_others_reach_a_service_at_the_machine_and_the_published_port(answer: Answer) -> None:
    """The network's gateway is this machine; of two published addresses, IPv4's and IPv6's, the port is the first's."""
    answer("port loader 5555", "0.0.0.0:32769\n[::]:32770\n")
    answer("network inspect", "172.18.0.1\n")
    assert Compose().outside_address("loader", 5555) == "172.18.0.1:32769"
