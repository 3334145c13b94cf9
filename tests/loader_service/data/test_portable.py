"""The extensions on other machines: without vector instructions, and compiled for arm64."""

from __future__ import annotations

import platform
import shutil
import subprocess
from collections.abc import Callable, Iterator
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType

import numpy as np
import numpy.typing as npt
import pytest

from loader_service.data import kernel
from loader_service.data.augment import complete_view
from loader_service.data.fill import empty_slice, fill
from loader_service.data.manifest import Manifest
from loader_service.data.records import Records
from loader_service.types import SampleLayout, Slice, SliceId, View
from tools.sanitize.builds import PACKAGE, SOURCES, compile_extension, own_compiler, zig

PORTABLE = ("-O2", "-DLOADER_SERVICE_PORTABLE")

ROWS = """
#include "_rows.h"

/* A program without a C library, because a cross compiler may have to build one first. Its exit code is 0 if row_neon makes the
 * bytes of row_c for rows of all lengths, mirrored and not, with random pixels and shifts, and writes nothing beyond them. */
static uint32_t state = 1;
static uint8_t in[768], by_neon[770], by_c[770];

static unsigned draw(unsigned below)
{
    state = state * 1664525 + 1013904223;
    return (state >> 8) % below;
}

static int differ(void)
{
    for (int n = 3; n <= 768; n += 3)
        for (int turn = 0; turn < 8; turn++) {
            Shift shift;
            const int16_t channels[3] = {(int16_t)draw(511) - 255, (int16_t)draw(511) - 255, (int16_t)draw(511) - 255};
            spread(&shift, channels);
            for (int i = 0; i < 770; i++)
                by_neon[i] = by_c[i] = 0xA5;
            for (int i = 0; i < n; i++)
                in[i] = (uint8_t)draw(256);
            row_neon(by_neon + 1, in, n, turn % 2, &shift);
            row_c(by_c + 1, in, n, turn % 2, &shift);
            for (int i = 0; i < 770; i++)
                if (by_neon[i] != by_c[i])
                    return 1;
        }
    return 0;
}

void _start(void)
{
    register long code __asm__("x0") = differ();
    register long call __asm__("x8") = 93; /* exit */
    __asm__ volatile("svc 0" : : "r"(code), "r"(call));
    __builtin_unreachable();
}
"""


def has_compiler() -> bool:
    """Return whether the installation's compiler is here."""
    return shutil.which(own_compiler()[0]) is not None


def for_arm64() -> list[str] | None:
    """Return the command of a compiler for arm64, if there is one."""
    if shutil.which("aarch64-linux-gnu-gcc"):
        return ["aarch64-linux-gnu-gcc"]
    if platform.machine() == "aarch64":
        return own_compiler()
    compiler = zig()
    return [*compiler, "-target", "aarch64-linux-musl"] if compiler else None


def load(name: str, path: Path) -> ModuleType:
    """Import an extension from a file, beside the installed one."""
    loader = ExtensionFileLoader(f"portable.{name}", str(path))
    spec = spec_from_loader(loader.name, loader)
    assert spec is not None
    module = module_from_spec(spec)
    loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def portable(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModuleType]:
    """The extensions, compiled without vector instructions."""
    if not has_compiler():
        pytest.skip("no C compiler here")
    folder = tmp_path_factory.mktemp("portable")
    modules = {}
    for source in SOURCES:
        compile_extension(source, folder / f"{source.stem}.so", own_compiler(), PORTABLE)
        modules[source.stem] = load(source.stem, folder / f"{source.stem}.so")
    return modules


@pytest.fixture
def without_vectors(portable: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The process uses the portable extensions until the test ends."""
    monkeypatch.setattr(kernel, "compiled", portable["_kernel"])
    monkeypatch.setattr(kernel, "_jpeg", portable["_jpeg"])
    monkeypatch.setattr(kernel, "FORMS", (*portable["_kernel"].forms(), "numpy"))
    monkeypatch.delenv(kernel.VARIABLE, raising=False)
    kernel.chosen.cache_clear()
    yield
    monkeypatch.undo()
    kernel.chosen.cache_clear()


def made(path: Path, dtype: str) -> Slice:
    """Make a slice of training samples."""
    with Records(path) as records:
        view = complete_view(View.named("train", records.side), records.statistics)
        out = empty_slice(SampleLayout(view, dtype), len(records))  # type: ignore[arg-type]
        fill(out, records, SliceId(view, 3, 2, 0, len(records)))
        return out


@pytest.mark.parametrize("codec", ["raw", "jpeg"])
@pytest.mark.parametrize("dtype", ["uint8", "float16", "float32"])
def test_without_vectors_the_bytes_are_the_same(
    codec: str, dtype: str, tmp_path: Path, make_dataset: Callable[..., Manifest], request: pytest.FixtureRequest
) -> None:
    """Extensions compiled without vector instructions make the bytes of the installed ones."""
    make_dataset(tmp_path / "d", 12, codec=codec, side=70)
    before = made(tmp_path / "d", dtype)
    request.getfixturevalue("without_vectors")
    assert kernel.FORMS == ("c", "numpy")
    assert kernel.chosen() == "c"
    assert not kernel.decodes_windows()
    after = made(tmp_path / "d", dtype)
    assert after.images.tobytes() == before.images.tobytes()
    assert after.labels.tolist() == before.labels.tolist()


def test_without_vectors_parts_are_declined(portable: dict[str, ModuleType]) -> None:
    """The portable decoder checks its arguments, declines every JPEG, and writes nothing."""
    into: npt.NDArray[np.uint8] = np.full(3 * 32 * 32, 7, np.uint8)
    assert not portable["_jpeg"].runs_here()
    assert portable["_jpeg"].decode(b"\xff\xd8", into, 32, 32, 0, 0, 8, 8) is False
    with pytest.raises(ValueError, match="does not lie within"):
        portable["_jpeg"].decode(b"\xff\xd8", into, 32, 32, 30, 0, 8, 8)
    assert (into == 7).all()


def arm64() -> list[str]:
    """Return the command of a compiler for arm64, or skip the test."""
    compiler = for_arm64()
    if compiler is None:
        pytest.skip("no compiler for arm64 here: neither aarch64-linux-gnu-gcc nor the package ziglang")
    return compiler


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_the_extensions_compile_for_arm64(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both extensions compile for arm64 without a warning."""
    monkeypatch.setenv("ZIG_LOCAL_CACHE_DIR", str(tmp_path))
    compile_extension(source, tmp_path / "module.so", arm64(), ("-O2",))
    header = (tmp_path / "module.so").read_bytes()[:20]
    assert header[18:20] == (183).to_bytes(2, "little")  # e_machine of ELF: EM_AARCH64


def test_rows_on_arm64(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The NEON form makes the bytes of the C form, on arm64 or in an emulator of it."""
    monkeypatch.setenv("ZIG_LOCAL_CACHE_DIR", str(tmp_path))
    compiler = arm64()
    emulator = next((name for name in ("qemu-aarch64", "qemu-aarch64-static") if shutil.which(name)), None)
    if emulator is None and platform.machine() != "aarch64":
        pytest.skip("this is no arm64, and qemu-aarch64 (package qemu-user) is not here to emulate one")
    program = str(tmp_path / "rows")
    (tmp_path / "rows.c").write_text(ROWS)
    (tmp_path / "string.h").write_text("#define memcpy __builtin_memcpy\n")  # all that _rows.h takes from the C library
    # No loop may become a call of memset or memcpy, which belong to the C library.
    flags = ["-O2", "-static", "-nostdlib", "-ffreestanding", "-fno-builtin", f"-I{PACKAGE / 'data'}", f"-I{tmp_path}"]
    subprocess.run([*compiler, *flags, f"{program}.c", "-o", program], check=True, timeout=100)
    assert subprocess.run([emulator, program] if emulator else [program], check=False, timeout=100).returncode == 0
