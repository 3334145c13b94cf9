"""Checks of the containers' files without Docker; `make docker` builds and runs the images."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest

import loader_service.cli
import tools.sample_images
import trainer.cli
from loader_service.cli.options import VARIABLES, variable

ROOT = Path(__file__).parent.parent
DOCKER = ROOT / "docker"
PROGRAMS: dict[str, click.Command] = {
    "loader-service": loader_service.cli.main,
    "trainer": trainer.cli.main,
    "python -m tools.sample_images": tools.sample_images.main,
}
TRAINERS = ("trainer", "trainer-cpu")


def rendered(**variables: str) -> dict[str, Any]:
    """Return docker/compose.yaml as Compose renders it, checked against the schema of the Compose specification."""
    program = shutil.which("docker-compose", path=f"{ROOT / '.venv' / 'bin'}{os.pathsep}{os.environ['PATH']}")
    assert program, "docker-compose comes with the extra `dev`"
    command = [program, "--file", str(DOCKER / "compose.yaml"), "--profile", "*", "config", "--format", "json"]
    environ = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), **variables}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    """Every service, with the default of every variable."""
    found: dict[str, Any] = rendered()["services"]
    return found


def dockerfile(name: str) -> str:
    """Return a Dockerfile's text, with continued lines joined."""
    return (DOCKER / f"{name}.Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")


def commands(services: dict[str, Any]) -> Iterator[list[str]]:
    """Yield every command line in the compose file and the Dockerfiles."""
    for name, service in services.items():
        words = service.get("command") or []
        if words[:1] == ["sh"]:
            for line in words[-1].replace("$$", "$").splitlines():
                yield shlex.split(re.sub(r".*\bexec ", "", line))
        elif words:
            yield ["trainer", *words] if name in TRAINERS else words
    for name in ("loader", "trainer"):
        arrays = [json.loads(found) for found in re.findall(r"\bCMD\s+(\[.*\])", dockerfile(name))]
        yield from (["trainer", *words] if name == "trainer" else words for words in arrays)


def parse(words: list[str]) -> str | None:
    """Parse a command line with its own program; return the program's name, None if it is not one of PROGRAMS."""
    for name, program in PROGRAMS.items():
        prefix = name.split()
        if words[: len(prefix)] == prefix:
            rest = words[len(prefix) :]
            context = program.make_context(name, rest, resilient_parsing=isinstance(program, click.Group))
            if isinstance(program, click.Group):
                command = program.commands[rest[0]]
                # This parser refuses unknown options, but does not look for the files that arguments name.
                parser = command.make_parser(click.Context(command, parent=context, info_name=rest[0]))
                _, left, _ = parser.parse_args(args=list(rest[1:]))
                assert not [word for word in left if word.startswith("-")]
            return name
    return None


def test_each_command_has_options_that_exist(services: dict[str, Any], tmp_path: Path) -> None:
    """Each program of ours in the compose file and the Dockerfiles accepts the options given there."""
    lines = [shlex.join(words) for words in commands(services)]
    here = [re.sub(r"/images(/samples)?", str(tmp_path), line) for line in lines]  # a folder that exists
    assert {name for line in here if (name := parse(shlex.split(line)))} == set(PROGRAMS)


def test_an_option_that_does_not_exist_is_refused() -> None:
    """The check of the commands finds unknown options."""
    with pytest.raises(click.NoSuchOption):
        parse(["loader-service", "start", "--worker-count", "2"])
    with pytest.raises(click.NoSuchOption):
        parse(["python", "-m", "tools.sample_images", "--no-such", "out"])


def test_each_variable_in_a_container_belongs_to_an_option(services: dict[str, Any]) -> None:
    """Each LOADER_SERVICE_... variable in the compose file belongs to an option of a command."""
    context = click.Context(loader_service.cli.main, auto_envvar_prefix=VARIABLES)
    known = {
        variable(click.Context(command, parent=context, info_name=name), parameter)
        for name, command in loader_service.cli.main.commands.items()
        for parameter in command.params
        if parameter.name
    }
    known |= {str(parameter.envvar) for parameter in trainer.cli.main.commands["run"].params if parameter.envvar}
    names = {name for service in services.values() for name in service.get("environment", {})}
    used = {name for name in names if name.startswith(VARIABLES)}
    assert used
    assert used - known == set()


def test_every_variable_is_explained_with_its_default() -> None:
    """.env.example lists each variable of the compose file with its default, and no other."""
    text = (DOCKER / "compose.yaml").read_text(encoding="utf-8")
    uses = re.findall(r"\$\{([A-Z_]+)(:?[-+]?)([^}]*)\}", text.replace("${VARIABLE}", ""))
    example = (DOCKER / ".env.example").read_text(encoding="utf-8").splitlines()
    explained = dict(line.split("=", 1) for line in example if line and not line.startswith("#"))
    assert {name for name, _, _ in uses} == explained.keys()
    # A folder's default is a volume, whose name is no path: there the example is empty.
    folders = {"IMAGES", "KEYS"}
    assert {n: d for n, _, d in uses if n not in folders} == {n: d for n, d in explained.items() if n not in folders}
    assert rendered(**explained)["services"] == rendered()["services"]


def test_containers_are_confined(services: dict[str, Any]) -> None:
    """No container can write to its root file system, has a capability or can gain one."""
    assert len(services) == 7
    for service in services.values():
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
    for name in ("loader", "trainer", "prometheus"):
        assert re.findall(r"^USER (.*)", dockerfile(name), re.MULTILINE) == ["10001:10001"]


def test_all_dependencies_are_started(services: dict[str, Any]) -> None:
    """`docker compose up trainer-cpu` is enough: its dependencies belong to no profile."""
    assert services["trainer-cpu"]["depends_on"]["loader"]["condition"] == "service_healthy"
    needs = services["loader"]["depends_on"]
    assert {name: need["condition"] for name, need in needs.items()} == {
        "preprocess": "service_completed_successfully",
        "keys": "service_completed_successfully",
        "shm": "service_started",
    }
    assert [name for name in ("loader", *needs) if services[name].get("profiles")] == []


def test_no_container_takes_all_of_the_machine(services: dict[str, Any]) -> None:
    """Each container has limits of memory and of processes, and a restart policy."""
    for service in services.values():
        limits = service["deploy"]["resources"]["limits"]
        assert int(limits["memory"]) >= 64 << 20
        assert limits["pids"] >= 16
        assert service["restart"]
    assert {name for name, service in services.items() if service["restart"] == "no"} == {"keys", "preprocess"}
    assert {name for name, service in services.items() if "stop_grace_period" in service} == services.keys() - {
        "keys",
        "preprocess",
    }


def test_shared_memory_outlives_its_users(services: dict[str, Any]) -> None:
    """Loaders and trainers use the /dev/shm of a container that does nothing else and depends on none of them."""
    users = {name for name, service in services.items() if service.get("ipc") == "service:shm"}
    assert users == {"loader", *TRAINERS}
    assert services["shm"]["ipc"] == "shareable"
    assert "depends_on" not in services["shm"]
    assert int(services["shm"]["shm_size"]) == 2 << 30


def test_one_trainer_asks_for_a_gpu_and_one_for_none(services: dict[str, Any]) -> None:
    """`trainer` reserves the GPU that it uses by default, or as many as asked; `trainer-cpu` runs the same command without."""
    [device] = services["trainer"]["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}
    [device] = rendered(TRAINER_GPUS="2")["services"]["trainer"]["deploy"]["resources"]["reservations"]["devices"]
    assert device["count"] == 2
    assert "reservations" not in services["trainer-cpu"]["deploy"]["resources"]
    assert services["trainer-cpu"]["command"] == services["trainer"]["command"]


def test_trainers_can_compile_at_run_time(services: dict[str, Any]) -> None:
    """The image has a compiler, and the caches of Triton and torch.compile are on a volume, since /tmp is not executable."""
    image = dockerfile("trainer").split("COPY --from=code")[0].split("FROM ${BASE}")[-1]
    installed = re.findall(r"apt-get install --yes --no-install-recommends ([^&]*)&&", image)[0].split()
    assert "g++" in installed
    assert "Python.h" in image
    settings = dict(re.findall(r"\b(TRITON_CACHE_DIR|TORCHINDUCTOR_CACHE_DIR)=(\S+)", dockerfile("trainer")))
    assert settings == {"TRITON_CACHE_DIR": "/cache/triton", "TORCHINDUCTOR_CACHE_DIR": "/cache/inductor"}
    assert re.search(r"install --directory --owner loader .*/cache\b", image)
    for name in TRAINERS:
        mounts = {mount["target"]: mount for mount in services[name]["volumes"]}
        assert mounts["/cache"]["type"] == "volume"
        assert not mounts["/cache"].get("read_only")


@pytest.mark.parametrize(("flags", "first"), [("sse4_2 avx2 bmi2", "/opt/pillow-avx2:"), ("sse4_2 avx", "")])
def test_the_processor_chooses_the_build_of_pillow(flags: str, first: str, tmp_path: Path) -> None:
    """The entry point puts the AVX2 build before the portable one if the processor has AVX2."""
    (tmp_path / "cpuinfo").write_text(f"flags\t\t: fpu {flags}\n", encoding="utf-8")
    command = ["sh", str(DOCKER / "entrypoint.sh"), "sh", "-c", 'printf %s "$PYTHONPATH"']
    environ = {"PATH": os.environ["PATH"], "CPUINFO": str(tmp_path / "cpuinfo"), "PYTHONPATH": "/opt/app"}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=True, timeout=30)
    assert done.stdout == f"{first}/opt/app"


def test_both_images_begin_with_the_same_layers() -> None:
    """The compiler stage is the same text in both Dockerfiles, so it is built once."""
    first, second = (dockerfile(name).split("FROM ${BASE} AS compiler", 1)[1] for name in ("loader", "trainer"))
    assert first.split("\n#", 1)[0] == second.split("\n#", 1)[0]


def test_every_copied_path_reaches_the_build() -> None:
    """Every path that a Dockerfile copies exists, and .dockerignore does not exclude it."""
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    kept = [line[1:] for line in lines if line.startswith("!")]
    for name in ("loader", "trainer"):
        copies = re.findall(r"^COPY (?!--from)(.*) \S+$", dockerfile(name), re.MULTILINE)
        assert copies
        for path in " ".join(copies).split():
            assert (ROOT / path).exists()
            assert any(Path(path).match(pattern) or path.startswith(f"{pattern}/") for pattern in kept), path
