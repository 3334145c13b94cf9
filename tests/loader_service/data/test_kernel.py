"""The kernel runs in the best form, in the named form, or in NumPy without the extension."""

from __future__ import annotations

import importlib.util
import platform
import sys
from collections.abc import Iterator

import numpy as np
import pytest

import loader_service.data
from loader_service.data import kernel
from loader_service.errors import OptionError


@pytest.fixture(autouse=True)
def _choose_anew() -> Iterator[None]:
    kernel.chosen.cache_clear()
    yield
    kernel.chosen.cache_clear()


def test_the_best_form_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the environment variable the first form is chosen."""
    monkeypatch.delenv(kernel.VARIABLE, raising=False)
    assert kernel.chosen() == kernel.FORMS[0]


@pytest.mark.parametrize("form", kernel.FORMS)
def test_the_environment_names_a_form(monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    """The environment variable can select every form that this machine can run."""
    monkeypatch.setenv(kernel.VARIABLE, form)
    assert kernel.chosen() == form


def test_an_unknown_form_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error for an unknown form names the variable, the value and the possible forms."""
    monkeypatch.setenv(kernel.VARIABLE, "abacus")
    with pytest.raises(OptionError, match=r"LOADER_SERVICE_KERNEL='abacus' cannot work: expected one of .*numpy"):
        kernel.chosen()


def test_numpy_serves_where_nothing_was_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the extension the module can be imported, and NumPy is the only form."""
    monkeypatch.delattr(loader_service.data, "_kernel", raising=False)
    monkeypatch.setitem(sys.modules, "loader_service.data._kernel", None)
    monkeypatch.delenv(kernel.VARIABLE, raising=False)
    spec = importlib.util.spec_from_file_location("kernel_without_extension", kernel.__file__)
    assert spec is not None
    assert spec.loader is not None
    bare = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bare)
    assert bare.compiled is None
    assert bare.FORMS == ("numpy",)
    assert bare.chosen() == "numpy"


@pytest.mark.skipif(kernel.compiled is None, reason="the extension was built without a compiler")
def test_the_forms_are_those_of_the_machine() -> None:
    """Plain C runs everywhere; x86-64 and arm64 put better forms before it."""
    assert kernel.FORMS[-2:] == ("c", "numpy")
    own = {"x86_64": {"avx512", "avx2"}, "aarch64": {"neon"}}.get(platform.machine(), set())
    assert set(kernel.FORMS[:-2]) <= own


@pytest.mark.parametrize("form", kernel.FORMS)
@pytest.mark.parametrize("skew", [0, 1, 63])
@pytest.mark.parametrize("size", [0, 1, 63, 64, 65, 200, 4096 + 7])
def test_a_copy_is_exact_and_writes_nothing_else(
    monkeypatch: pytest.MonkeyPatch, form: str, skew: int, size: int
) -> None:
    """A copy is exact for all sizes and alignments, and writes nothing else."""
    monkeypatch.setenv(kernel.VARIABLE, form)
    content = np.arange(size, dtype=np.uint32).astype(np.uint8)
    memory = np.full(size + 128, 0xA5, np.uint8)
    kernel.copy(memory[skew : skew + size], content)
    assert memory[skew : skew + size].tobytes() == content.tobytes()
    assert (memory[:skew] == 0xA5).all()
    assert (memory[skew + size :] == 0xA5).all()


@pytest.mark.parametrize("form", kernel.FORMS)
def test_a_copy_of_another_size_is_refused(monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    """The error for a copy of another size names both sizes."""
    monkeypatch.setenv(kernel.VARIABLE, form)
    with pytest.raises(ValueError, match="3 bytes do not fill 2"):
        kernel.copy(np.zeros(2, np.uint8), np.zeros(3, np.uint8))


@pytest.mark.parametrize("form", kernel.FORMS)
@pytest.mark.parametrize("side", [1, 15, 99, 256, 1024])
def test_sums_are_exact_in_every_form(monkeypatch: pytest.MonkeyPatch, form: str, side: int) -> None:
    """The sums of pixels and of products are exact integers, also for white images."""
    monkeypatch.setenv(kernel.VARIABLE, form)
    noise = np.random.Generator(np.random.Philox(key=side)).integers(0, 256, (side, side, 3), np.uint8)
    white = np.full_like(noise, 255)
    total, products = np.zeros(noise.shape, np.uint16), np.zeros((3, 3), np.int64)
    for pixels in (noise, white):
        kernel.add(pixels, total, products)
    np.testing.assert_array_equal(total, noise.astype(np.uint16) + 255)
    flat = np.concatenate([noise, white]).reshape(-1, 3).astype(np.int64)
    np.testing.assert_array_equal(products, flat.T @ flat)


@pytest.mark.parametrize("form", kernel.FORMS)
def test_sums_of_another_shape_are_refused(monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    """An image of another shape than the sum is refused."""
    monkeypatch.setenv(kernel.VARIABLE, form)
    total = np.zeros((8, 8, 3), np.uint16)
    with pytest.raises(ValueError, match=r"pixels|total"):
        kernel.add(np.ones((9, 9, 3), np.uint8), total, np.zeros((3, 3), np.int64))
    assert not total.any()
