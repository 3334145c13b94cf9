"""Commands given to Docker, checks of its answers, and the removal of a project."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tools.containers.compose import Compose
from tools.errors import ToolFailed

Answer = Callable[..., None]
Asked = Callable[[], list[list[str]]]

DOWN = ["down", "--volumes", "--remove-orphans", "--timeout", "10"]


def test_without_compose_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing program is one sentence, without a traceback."""
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
def test_a_project_is_removed_however_the_block_ends(asked: Asked, error: type[BaseException]) -> None:
    """Remains of a killed run are removed before the block and its own containers after it, of this project alone."""
    with pytest.raises(error), Compose("mine"):
        raise error
    downs = [words for words in asked() if words[-5:] == DOWN]
    assert len(downs) == 2
    assert all(words[words.index("--project-name") + 1] == "mine" for words in downs)


def test_a_failed_command_is_named(answer: Answer) -> None:
    """The error has the command as a person types it, and its exit code."""
    answer("up", code=17)
    with pytest.raises(ToolFailed, match=r"`docker compose .* up --detach loader` ended with exit code 17"):
        Compose().run("up", "--detach", "loader")


def test_a_log_is_read_up_to_the_awaited_line(answer: Answer, capsys: pytest.CaptureFixture[str]) -> None:
    """The awaited line is found once, in order, and every line is copied to the terminal."""
    answer("logs --follow", "one\ntwo\nthree\n")
    answer("{{.ExitCode}}", "0\n")
    compose = Compose()
    with compose.follow("trainer") as log:
        log.until(re.compile("two"), "it said two")
        assert "three" not in capsys.readouterr().out
        log.finish()
    assert capsys.readouterr().out.startswith("three\n")


def test_a_service_that_ends_too_early_is_an_error(answer: Answer) -> None:
    """A service that ended well without the awaited line is an error all the same."""
    answer("logs --follow", "one\n")
    answer("{{.ExitCode}}", "0\n")
    with (
        Compose().follow("trainer") as log,
        pytest.raises(ToolFailed, match="ended before it said two; its lines are above"),
    ):
        log.until(re.compile("two"), "it said two")


def test_a_service_that_fails_fails_the_run(answer: Answer) -> None:
    """The exit code is asked for when the log has ended."""
    answer("logs --follow", "one\n")
    answer("{{.ExitCode}}", "3\n")
    with Compose().follow("trainer") as log, pytest.raises(ToolFailed, match="trainer ended with exit code 3"):
        log.finish()


def test_a_status_is_read_from_the_loaders_own_container(answer: Answer, status_json: Callable[..., str]) -> None:
    """`loader-service status --json` runs in the container with that number; rates are left out."""
    answer("exec -T --index 2 loader loader-service status --json", status_json(["shm"], [30, 12]))
    status = Compose().status(2)
    assert [client.transport for client in status.clients] == ["shm"]
    assert [worker.samples for worker in status.workers] == [30, 12]


def test_output_that_is_no_status_is_refused(answer: Answer) -> None:
    """A container's output is checked before it is used."""
    answer("status --json", '{"clients": 5}')
    with pytest.raises(ToolFailed, match="output of `loader-service status --json` is not what"):
        Compose().status(1)


def test_running_containers_are_known_by_their_numbers(answer: Answer, asked: Asked) -> None:
    """A container's name ends in its number; killed containers are named one by one."""
    answer("ps", "mine-loader-2\nmine-loader-11\n")
    compose = Compose("mine")
    assert compose.indices("loader") == {2, 11}
    compose.destroy("loader", 2, 11)
    assert asked()[-1] == ["rm", "--force", "mine-loader-2", "mine-loader-11"]


def test_a_metric_is_one_number(answer: Answer) -> None:
    """Prometheus answers with series; an unknown series is 0, and anything else is refused."""
    compose = Compose()
    answer("promtool", '[{"metric":{},"value":[1795470734.626,"14880"]}]')
    assert compose.metric("sum(x)") == 14880
    answer("promtool", "[]")
    assert compose.metric("sum(x)") == 0
    answer("promtool", '{"status": "error"}')
    with pytest.raises(ToolFailed, match="Prometheus's answer is not what"):
        compose.metric("sum(x)")


def test_other_hosts_reach_a_service_at_its_published_port(answer: Answer) -> None:
    """The network's gateway is this machine; IPv4's port is taken, which is published first."""
    answer("port loader 5555", "0.0.0.0:32769\n[::]:32770\n")
    answer("network inspect", "172.18.0.1\n")
    assert Compose().outside_address("loader", 5555) == "172.18.0.1:32769"
