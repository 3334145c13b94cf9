"""Tests of the tensor wrapper: values, devices and states."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from loader_service import Batch, Loader, errors
from loader_service.torch import LookAhead, TensorLoader

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU])]
GPUS = (torch.device("cuda", 0), torch.device("cuda", 1))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("view", ["train", "ten-crop"])
def test_tensors_have_the_arrays_values(node_address: str, device: str, view: str) -> None:
    """Every tensor equals its array and is on the requested device."""
    with Loader(node_address, split="val", view=view, batch_size=16, timeout_s=20) as loader:
        arrays = [(b.images.copy(), b.labels.copy(), b.ids.copy(), b.draws.copy(), b.epoch, b.start) for b in loader]
    with Loader(node_address, split="val", view=view, batch_size=16, timeout_s=20) as loader, TensorLoader(loader, device) as batches:  # fmt: skip
        assert len(batches) == len(arrays)
        for batch, (images, labels, ids, draws, epoch, start) in zip(batches, arrays, strict=True):
            assert batch.images.device.type == device
            for tensor, array in (
                (batch.images, images),
                (batch.labels, labels),
                (batch.ids, ids),
                (batch.sources, ids),
            ):
                np.testing.assert_array_equal(tensor.cpu().numpy(), array)
            for name in ("y", "x", "flip", "shift"):
                np.testing.assert_array_equal(getattr(batch, name).cpu().numpy(), draws[name])
            assert (batch.epoch, batch.start) == (epoch, start)
            del batch


@pytest.mark.parametrize("device", DEVICES)
def test_a_state_counts_what_was_handed_out(node_address: str, device: str) -> None:
    """An iterator that is restored between two batches continues with the second, however many were prefetched."""
    with Loader(node_address, batch_size=50, epochs=2, timeout_s=20) as loader:
        starts = [(b.epoch, b.start) for b in loader.all_epochs()]
    for stop in (0, 1, 6, 11):
        with Loader(node_address, batch_size=50, epochs=2, timeout_s=20) as loader, TensorLoader(loader, device) as batches:  # fmt: skip
            head = [(b.epoch, b.start) for b in (next(batches.all_epochs()) for _ in range(stop))]
            state = batches.state_dict()
        with Loader(node_address, batch_size=50, epochs=2, timeout_s=20) as loader, TensorLoader(loader, device) as batches:  # fmt: skip
            batches.load_state_dict(state)
            assert head + [(b.epoch, b.start) for b in batches.all_epochs()] == starts


def test_a_missing_device_is_named(node_address: str) -> None:
    """The error names the device."""
    with Loader(node_address, timeout_s=20) as loader:
        for device in ("gpu", "mps", "cuda:99" if not torch.cuda.is_available() else "meta"):
            with pytest.raises(errors.OptionError, match=f"device='{device}'"):
                TensorLoader(loader, device)


def test_several_devices_get_every_batch(node_address: str) -> None:
    """The first device's batch has the others' as copies; a device that occurs twice gets one copy."""
    with Loader(node_address, batch_size=16, timeout_s=20) as loader, TensorLoader(loader, ("cpu", "cpu")) as batches:
        batch = next(batches.all_epochs())
        (copy,) = batch.copies
        assert copy.images.data_ptr() == batch.images.data_ptr()
        assert copy.copies == ()
        assert batches.device == torch.device("cpu")


@pytest.mark.parametrize("device", DEVICES)
def test_extra_arrays_travel_with_their_batch(node_address: str, device: str) -> None:
    """A batch brings back the arrays that ``extra`` returned for it, in their shapes and dtypes."""

    def extra(batch: Batch) -> dict[str, Any]:
        return {"start": np.array([[batch.start]], np.int16), "flips": batch.draws["flip"]}

    with Loader(node_address, batch_size=64, timeout_s=20) as loader, TensorLoader(loader, device, extra=extra) as batches:  # fmt: skip
        for batch in batches:
            assert batch.extra["start"].tolist() == [[batch.start]]
            assert batch.extra["start"].dtype == torch.int16
            assert torch.equal(batch.extra["flips"], batch.flip)


VIEWS: dict[str, Any] = {"train": {}, "ten-crop": {"view": "ten-crop"}, "whole": {"view": "whole"}}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("view", VIEWS)
def test_the_mean_image_is_subtracted_as_the_node_does(node_address: str, device: str, view: str) -> None:
    """With mean="image", images equal those of a Loader of float32 or float16, bit for bit, in every layout."""
    options: dict[str, Any] = {"batch_size": 6, "seed": 2, "timeout_s": 20, **VIEWS[view]}
    for dtype in ("float32", "float16"):
        with Loader(node_address, dtype=dtype, **options) as loader:
            batch = next(iter(loader))
            expected = torch.from_numpy(batch.images.copy())
            assert batch.draws["flip"].any() or view == "whole"
        for layout in ("nhwc", "nchw", "channels_last"):
            with (
                Loader(node_address, **options) as loader,
                TensorLoader(loader, device, layout=layout, dtype=dtype, mean="image") as batches,  # type: ignore[arg-type]
            ):
                images = next(iter(batches)).images.cpu()
            if layout != "nhwc":
                assert images.shape[-3:] == (3, *expected.shape[-3:-1])
                images = images.movedim(-3, -1)
            assert images.dtype == expected.dtype
            assert torch.equal(images, expected)


@pytest.mark.parametrize("device", DEVICES)
def test_layouts_and_dtypes(node_address: str, device: str) -> None:
    """nchw is contiguous, channels_last is not copied, and pixels stay uint8 unless a dtype or a normalisation is given."""
    with Loader(node_address, batch_size=16, timeout_s=20) as loader:
        raw = torch.from_numpy(next(iter(loader)).images.copy())

        def first(**options: Any) -> Tensor:
            loader.set_epoch(0)
            with TensorLoader(loader, device, **options) as batches:
                images: Tensor = next(iter(batches)).images.cpu()
                return images

        assert torch.equal(first(), raw)
        nchw, last = first(layout="nchw"), first(layout="channels_last")
        assert torch.equal(nchw, last)
        assert torch.equal(nchw, raw.movedim(-1, 1))
        assert nchw.is_contiguous()
        assert last.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(first(dtype=torch.bfloat16), raw.to(torch.bfloat16))
        mean, std = [123.0, 117.0, 104.0], [58.0, 57.0, 57.5]
        scaled = (raw.float() - torch.tensor(mean)) / torch.tensor(std)
        assert torch.equal(first(mean=mean, std=std), scaled)
        assert torch.equal(first(mean=np.array(mean), std=torch.tensor(std), dtype="float16"), scaled.half())
        channels = torch.tensor(loader.dataset.channel_means, dtype=torch.float32)
        assert torch.equal(first(mean="channels"), raw.float() - channels)


@pytest.mark.parametrize("device", DEVICES)
def test_fields_unpack(node_address: str, device: str) -> None:
    """With fields=("images", "labels") each batch is that pair, as loops of PyTorch have it."""
    with (
        Loader(node_address, batch_size=100, timeout_s=20) as loader,
        TensorLoader(loader, device, layout="nchw", mean="image", fields=("images", "labels")) as batches,
    ):
        for epoch in range(2):
            for x, y in batches:
                assert (x.shape, x.dtype, y.shape, y.dtype) == ((100, 3, 224, 224), torch.float32, (100,), torch.int64)
                assert batches.epoch == epoch


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"layout": "chw"}, "layout='chw' cannot work: expected nhwc or nchw or channels_last"),
        ({"dtype": "int8"}, "dtype='int8'"),
        ({"dtype": "uint8", "mean": "image"}, "dtype='uint8'"),
        ({"mean": "picture"}, "mean='picture'"),
        ({"mean": [1, 2]}, "three numbers"),
        ({"std": [1, 0, 1]}, "three numbers other than 0"),
        ({"fields": "images"}, "fields='images'"),
        ({"fields": ["image"]}, "a sequence of names out of images, labels"),
        ({"fields": ["images"], "device": ("cpu", "cpu")}, "None with several devices"),
    ],
    ids=str,
)
def test_forms_that_cannot_be_are_named(node_address: str, options: dict[str, Any], sentence: str) -> None:
    """The error names the argument, and another TensorLoader may be opened after it."""
    with Loader(node_address, batch_size=16, timeout_s=20) as loader:
        with pytest.raises(errors.OptionError, match=sentence):
            TensorLoader(loader, **options)
        TensorLoader(loader).close()


def test_a_mean_is_not_subtracted_twice(node_address: str) -> None:
    """A Loader of float32 has subtracted it, so another mean is refused."""
    with Loader(node_address, batch_size=16, dtype="float32", timeout_s=20) as loader:
        with pytest.raises(
            errors.OptionError, match="mean='image' cannot work: expected None with a Loader of float32"
        ):
            TensorLoader(loader, mean="image")
        with TensorLoader(loader, layout="nchw") as batches:
            assert next(iter(batches)).images.dtype == torch.float32


@pytest.mark.parametrize("device", DEVICES)
def test_a_second_tensor_loader_is_refused(node_address: str, device: str) -> None:
    """Two on one Loader would each get a part of the batches; after close() or collection of the first one, another may."""
    with Loader(node_address, timeout_s=20) as loader:
        first = TensorLoader(loader, device)
        with pytest.raises(errors.OptionError, match="without another open TensorLoader: close that one first"):
            TensorLoader(loader, device)
        first.close()
        first.close()  # does nothing
        with pytest.raises(errors.LoaderClosed, match="this TensorLoader is closed"):
            next(first.all_epochs())
        second = TensorLoader(loader, device)
        next(second.all_epochs())
        del second
        gc.collect()
        with TensorLoader(loader, device) as third:
            next(third.all_epochs())


class PretendedStream:
    """A stream whose copies are made when it is waited for, as late as possible."""

    def __init__(self) -> None:
        self.work: list[Callable[[], object]] = []
        self.done = 0

    def record_event(self) -> PretendedEvent:
        return PretendedEvent(self)

    def wait_event(self, event: PretendedEvent) -> None:
        """Do nothing: the host goes on, and the copies are made later."""

    def synchronize(self) -> None:
        while self.work:
            self.work.pop(0)()
            self.done += 1


class PretendedEvent:
    """A point in a stream, reached when nothing before it is left to do."""

    def __init__(self, stream: PretendedStream) -> None:
        self._stream, self._reached_at = stream, stream.done + len(stream.work)

    def query(self) -> bool:
        return self._stream.done >= self._reached_at


class PretendedCuda:
    """Two GPUs whose tensors lie on the CPU, and CUDA's registration of host memory.

    Fields:
        copies: (bytes, True if the source is pinned) of each copy to a GPU.
        registered: size of each registered block, by address.
        code: error of the next registrations; 0 for none.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.copies: list[tuple[int, bool]] = []
        self.registered: dict[int, int] = {}
        self.code = 0
        self.consumer = PretendedStream()
        self._pinned: list[Tensor] = []
        self._current: PretendedStream | None = None
        self._streams: list[PretendedStream] = []
        empty, to = torch.empty, Tensor.to

        def pinned_empty(*size: Any, pin_memory: bool = False, **more: Any) -> Tensor:
            tensor = empty(*size, **more)
            if pin_memory:
                self._pinned.append(tensor)
            return tensor

        def copy(tensor: Tensor, device: object, non_blocking: bool = False) -> Tensor:
            if device not in GPUS:
                return to(tensor, device)
            assert non_blocking
            assert self._current is not None, "a copy on the consumer's stream would wait for the step"
            self.copies.append((tensor.nbytes, self._is_pinned(tensor)))
            target = torch.zeros_like(tensor)
            self._current.work.append(lambda: target.copy_(tensor))
            return target

        monkeypatch.setattr(torch, "empty", pinned_empty)
        monkeypatch.setattr(Tensor, "to", copy)
        monkeypatch.setattr(Tensor, "record_stream", lambda tensor, stream: None)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "cudart", lambda: self)
        monkeypatch.setattr(torch.cuda, "device", nullcontext)
        monkeypatch.setattr(torch.cuda, "Stream", self._new_stream)
        monkeypatch.setattr(torch.cuda, "stream", self._use)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self.consumer)

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:  # noqa: N802
        assert flags == 1  # for all GPUs
        if self.code:
            return self.code
        if address in self.registered:
            return 712
        self.registered[address] = size
        return 0

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        return 0 if self.registered.pop(address, None) else 713

    def finish(self) -> None:
        """Let all copies be made."""
        for stream in self._streams:
            stream.synchronize()

    def _is_pinned(self, tensor: Tensor) -> bool:
        blocks = [(block.data_ptr(), block.nbytes) for block in self._pinned] + list(self.registered.items())
        return any(
            start <= tensor.data_ptr() and tensor.data_ptr() + tensor.nbytes <= start + size for start, size in blocks
        )

    def _new_stream(self, device: object) -> PretendedStream:
        self._streams.append(PretendedStream())
        return self._streams[-1]

    @contextmanager
    def _use(self, stream: PretendedStream) -> Iterator[None]:
        self._current = stream
        yield
        self._current = None


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> PretendedCuda:
    return PretendedCuda(monkeypatch)


@pytest.fixture
def always_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the next batch count as ready, so that every step copies one ahead."""
    monkeypatch.setattr(Loader, "ready", property(lambda loader: 1))


def arrays(address: str, **options: Any) -> list[tuple[Any, ...]]:
    with Loader(address, timeout_s=20, **options) as loader:
        return [(b.images.copy(), b.labels.copy(), b.ids.copy(), b.draws.copy()) for b in loader]


@pytest.mark.usefixtures("always_ready")
def test_a_batch_travels_to_each_gpu_in_two_pinned_copies(node_address: str, cuda: PretendedCuda) -> None:
    """Pixels go straight from their slot, and everything else in one packet; the host never waits for a step."""
    expected = arrays(node_address, batch_size=32)
    with Loader(node_address, batch_size=32, epochs=1, timeout_s=20) as loader, TensorLoader(loader, GPUS, extra=lambda b: {"e": b.ids}) as batches:  # fmt: skip
        for images, labels, ids, draws in expected:
            batch = next(batches.all_epochs())
            cuda.finish()
            for each in (batch, *batch.copies):
                np.testing.assert_array_equal(each.images.numpy(), images)
                for tensor, array in ((each.labels, labels), (each.ids, ids), (each.extra["e"], ids)):
                    np.testing.assert_array_equal(tensor.numpy(), array)
                for name in ("y", "x", "flip", "shift"):
                    np.testing.assert_array_equal(getattr(each, name).numpy(), draws[name])
            assert len(batch.copies) == 1
        with pytest.raises(StopIteration):
            next(batches.all_epochs())
    assert all(pinned for _, pinned in cuda.copies)
    assert len(cuda.copies) == 2 * len(GPUS) * len(expected)


@pytest.mark.usefixtures("always_ready")
def test_a_slot_is_kept_until_its_copies_are_done(node_address: str, cuda: PretendedCuda) -> None:
    """A slow GPU holds slots, not wrong pixels; once its copies are done the slots return."""
    expected = arrays(node_address, batch_size=16)
    with Loader(node_address, batch_size=16, prefetch=6, timeout_s=20) as loader, TensorLoader(loader, "cuda") as batches:  # fmt: skip
        handed_out = [next(batches.all_epochs()) for _ in range(5)]
        assert loader.metrics.slots["held"] == 6  # with the one that is copied ahead
        cuda.finish()
        next(batches.all_epochs())
        assert loader.metrics.slots["held"] == 2
        for batch, (images, *_) in zip(handed_out, expected, strict=False):
            np.testing.assert_array_equal(batch.images.numpy(), images)


@pytest.mark.usefixtures("cuda")
def test_held_slots_are_no_standstill(node_address: str) -> None:
    """If the loader can deliver nothing before copies are done, next() waits for them instead of failing."""
    expected = arrays(node_address, batch_size=16)
    with Loader(node_address, batch_size=16, prefetch=1, epochs=1, timeout_s=20) as loader, TensorLoader(loader, "cuda") as batches:  # fmt: skip
        assert len(list(batches)) == len(expected)


@pytest.mark.usefixtures("cuda")
def test_a_batch_does_not_wait_for_the_next_one(node_address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the next batch is not ready, this one is returned alone."""
    monkeypatch.setattr(Loader, "ready", property(lambda loader: 0))
    with Loader(node_address, batch_size=16, timeout_s=20) as loader, TensorLoader(loader, "cuda") as batches:
        next(batches.all_epochs())
        assert batches.state_dict() == loader.state_dict()


@pytest.mark.usefixtures("always_ready")
def test_state_and_ledger_count_what_was_returned(node_address: str, cuda: PretendedCuda) -> None:
    """A batch that is copied ahead is neither passed in the state nor delivered in the ledger."""
    with Loader(node_address, batch_size=16, epochs=2, timeout_s=20) as loader, TensorLoader(loader, "cuda") as batches:
        start = batches.state_dict()
        batch = next(batches.all_epochs())
        assert batches.state_dict() != loader.state_dict()
        assert batches.ledger[0].delivered == 16
        assert loader.ledger[0].delivered == 32
        batches.load_state_dict(start)
        again = next(batches.all_epochs())
        cuda.finish()
        assert again.ids.tolist() == batch.ids.tolist() != [0] * 16


@pytest.mark.usefixtures("always_ready")
def test_look_ahead_crosses_epochs(node_address: str, cuda: PretendedCuda) -> None:
    """A TensorLoader that is a batch ahead at a break drops it, and its loops, states and accounts are as without."""
    whole = [0, 64, 128, 192, 256]

    def places(batches: TensorLoader[Any]) -> Iterator[tuple[int, int]]:
        for batch in batches:
            cuda.finish()
            yield batch.epoch, batch.start

    with Loader(node_address, batch_size=64, crop=8, timeout_s=20) as loader, TensorLoader(loader, "cuda") as batches:
        for batch in batches:
            if batch.start == 192:  # the epoch's last batch is being copied
                break
        assert batches.state_dict()["position"] == 256
        assert (loader.state_dict()["epoch"], loader.state_dict()["position"]) == (1, 0)
        assert list(places(batches)) == [(1, start) for start in whole]
        assert (loader.state_dict()["epoch"], loader.state_dict()["position"]) == (2, 64)
        assert list(places(batches)) == [(2, start) for start in whole]
        accounts = [(account.expected, account.delivered, account.left_out) for account in batches.ledger]
        assert accounts == [(300, 256, 44), (300, 300, 0), (300, 300, 0)]


def test_memory_that_cuda_refuses_is_named(node_address: str, cuda: PretendedCuda) -> None:
    """The error has CUDA's number, and the loader stays usable."""
    with Loader(node_address, batch_size=16, timeout_s=20) as loader:
        cuda.code = 2
        with pytest.raises(errors.PinnedMemoryError, match=r"CUDA error 2.*lower prefetch or batch_size"):
            TensorLoader(loader, "cuda")
        cuda.code = 0
        with TensorLoader(loader, "cuda") as batches:
            assert list(cuda.registered.values()) == [loader.memory.nbytes]
            next(batches.all_epochs())
    assert cuda.registered == {}


def test_memory_is_unregistered_without_close(node_address: str, cuda: PretendedCuda) -> None:
    """A TensorLoader that is dropped waits for its copies and unregisters the slots."""
    with Loader(node_address, batch_size=16, timeout_s=20) as loader:
        batches = TensorLoader(loader, "cuda")
        batch = next(batches.all_epochs())
        del batches
        gc.collect()
        assert cuda.registered == {}
        assert batch.images.any()


def one_ahead(batches: Any, stop: int) -> tuple[list[int], dict[str, Any]]:
    """Loop as Lightning and Accelerate do, until the loop was given ``stop`` batches; return their starts and the state."""
    given = []
    iterator = iter(batches)
    current = next(iterator, None)
    while current is not None:
        following = next(iterator, None)
        given.append(current.start)
        if len(given) == stop:
            break
        current = following
    return given, batches.state_dict()


@pytest.mark.parametrize("stop", [1, 3, 5])
def test_look_ahead_states_what_the_loop_was_given(node_address: str, stop: int) -> None:
    """A checkpoint of a framework that holds the next batch already continues with that batch, or with the next epoch."""
    whole = [0, 64, 128, 192, 256]
    with Loader(node_address, batch_size=64, crop=8, timeout_s=20) as loader, TensorLoader(loader) as batches:
        given, state = one_ahead(LookAhead(batches), stop)
    assert given == whole[:stop]
    assert (state["epoch"], state["position"]) == ((0, 64 * stop) if stop < 5 else (1, 0))
    with Loader(node_address, batch_size=32, crop=8, timeout_s=20) as loader, TensorLoader(loader) as batches:
        ahead = LookAhead(batches)
        ahead.load_state_dict(state)
        assert ahead.state_dict() == state
        assert [batch.start for batch in ahead] == list(range(state["position"], 300, 32))


def test_look_ahead_begins_no_epoch_for_a_batch_that_only_the_framework_took(node_address: str) -> None:
    """An iterator that is replaced before the loop was given a batch costs nothing; after a break comes the next epoch."""
    with Loader(node_address, batch_size=64, crop=8, timeout_s=20) as loader, TensorLoader(loader) as batches:
        ahead = LookAhead(batches)
        assert next(iter(ahead)).start == 0
        assert [(batch.epoch, batch.start) for batch in ahead] == [(0, start) for start in (0, 64, 128, 192, 256)]
        one_ahead(ahead, 2)
        assert [batch.epoch for batch in ahead] == [2] * 5


def test_a_dataloader_passes_a_look_aheads_batches_on(node_address: str) -> None:
    """DataLoader(LookAhead(batches), batch_size=None) gives them as they are."""
    with Loader(node_address, batch_size=64, crop=8, timeout_s=20) as loader:
        with TensorLoader(loader, fields=("images", "ids")) as batches:
            starts = [len(ids) for _, ids in torch.utils.data.DataLoader(LookAhead(batches), batch_size=None)]
        assert starts == [64, 64, 64, 64, 44]
