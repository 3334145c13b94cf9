"""Batches as tensors, resumed feeds, and the choice of the node."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from loader_service import LocalNode, defaults, describe
from loader_service.errors import KeyRefused, LoaderServiceError, NoNodeError, PictureError
from trainer.config import Source
from trainer.data import feed
from trainer.data.feed import Endpoint, Feed, load_image, open_source, training_view
from trainer.data.normalisation import Facts, MeanSubtraction
from trainer.model import dropout
from trainer.model.ablation import Ablation
from trainer.model.alexnet import AlexNet
from trainer.model.dropout import DrawnMasks, MaskPlan, dropout_mask
from trainer.model.presets import PRESETS
from trainer.model.rng import DropoutKey

CPU = (torch.device("cpu"),)
CLASSES = 3


def ids_of(batches: Feed) -> list[int]:
    return [int(number) for batch in batches for number in batch.ids]


def test_batches_are_tensors(node: str) -> None:
    """A batch has uint8 pixels, labels and crop positions; the feed knows the facts about the dataset."""
    with Feed(Endpoint(node, ""), "train", "train", 32, (*CPU, *CPU)) as batches:
        batch = next(batches)
        assert [images.shape for images in batch.images] == [(32, 224, 224, 3)] * 2
        assert batch.images[0].dtype == torch.uint8
        assert batch.labels.tolist() == [int(number) % CLASSES for number in batch.ids]
        assert [len(windows.y) for windows in batch.windows] == [32] * 2
        assert batches.waited_s > 0
        assert batches.facts.count == 300
        assert batches.facts.class_names == ("ant", "bee", "cat")
        assert batches.facts.mean.shape == (256, 256, 3)


def test_ten_crops_follow_each_other(node: str) -> None:
    """The ten crops of a record are adjacent; each record has one label."""
    with Feed(Endpoint(node, ""), "val", "ten-crop", 4, CPU) as batches:
        batch = next(batches)
    assert batch.views == 10
    assert batch.images[0].shape == (40, 224, 224, 3)
    assert len(batch.labels) == 4
    assert batch.windows[0].flip[:10].tolist() == [False] * 5 + [True] * 5


def test_a_feed_goes_on_where_another_was_left(node: str) -> None:
    """Two feeds, the second resumed from the first, deliver each sample of both epochs once."""
    with Feed(Endpoint(node, ""), "train", "train", 32, CPU, seed=3, epochs=2) as batches:
        first = [int(number) for _ in range(4) for number in next(batches).ids]
        state = batches.state()
    with Feed(Endpoint(node, ""), "train", "train", 16, CPU, seed=3, epochs=2, state=state) as batches:
        rest = ids_of(batches)
        accounts = batches.accounts()
    together = first + rest
    assert sorted(together[:300]) == sorted(together[300:]) == list(range(300))
    assert [(account.expected, account.delivered) for account in accounts] == [(300 - 128, 300 - 128), (300, 300)]


def test_masks_come_with_their_batch(node: str) -> None:
    """Each batch has the masks of its own step, for every layer and device; for another key they are drawn on use."""
    plan = MaskPlan(DropoutKey(seed=3, step=7, replica=1), {(0, 6): 20, (0, 7): 13, (1, 6): 20})
    with Feed(Endpoint(node, ""), "train", "train", 128, (*CPU, *CPU)) as batches:
        batches.draw_masks(plan)
        for number, batch in enumerate(batches):
            images, key = len(batch.labels), DropoutKey(3, 7 + number, 1)
            masks = batch.dropout(key)
            assert isinstance(masks, DrawnMasks)
            for (tower, layer), units in plan.units.items():
                mask = dropout_mask((images, units), masks, tower, layer, CPU[0])
                assert torch.equal(mask, dropout_mask((images, units), key, tower, layer, CPU[0]))
            other = DropoutKey(3, 8 + number, 1)
            assert batch.dropout(other) is other
    assert number == 2


def test_a_step_uses_the_masks_that_came(node: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The network draws no masks of its own, in either layout of the towers, and its outputs are those of the key."""
    for devices in (CPU, CPU * 2):
        model = AlexNet(3, width=0.05, crop=64, devices=devices).train()
        with Feed(Endpoint(node, ""), "train", "train", 100, devices, crop=64) as batches:
            batches.draw_masks(MaskPlan(DropoutKey(0, 5), model.dropout_units()))
            batch, subtract = next(batches), MeanSubtraction(batches.facts.mean, model.preset, devices)
        images = subtract(batch.images, batch.windows)
        expected = model(images, DropoutKey(0, 5))
        with monkeypatch.context() as patch:
            patch.setattr(dropout, "dropout_bits", lambda *_, **__: pytest.fail("a mask was drawn in the step"))
            assert torch.equal(model(images, batch.dropout(DropoutKey(0, 5))), expected)


def test_original_jitter_is_by_standard_deviation(node: str) -> None:
    """The basis is 255 x eigenvector x sqrt(eigenvalue) by column; the paper's is the loader's default."""
    facts = describe(node)
    basis = np.array(training_view(PRESETS["original"], Ablation(), Endpoint(node, "")).basis).reshape(3, 3)
    np.testing.assert_allclose(basis, 255 * facts.eigenvectors * np.sqrt(facts.eigenvalues)[None, :])
    assert training_view(PRESETS["paper"], Ablation(), Endpoint(node, "")).basis == ()


def test_augmentations_can_be_switched_off(node: str) -> None:
    """Jitter, flips and crops can be off, each; without crops the centre comes in shuffled order."""
    plain = {"jitter": False, "flips": False}
    for ablation in (Ablation(jitter=False), Ablation(**plain), Ablation(**plain, crops=False)):
        view = training_view(PRESETS["original"], ablation, Endpoint(node, ""))
        with Feed(Endpoint(node, ""), "train", view, 32, CPU) as batches:
            batch = next(batches)
        assert view.jitter == 0
        assert batch.windows[0].flip.any() == ablation.flips
        assert (len(set(batch.windows[0].y.tolist())) > 1) == ablation.crops
        assert batch.ids.tolist() != sorted(batch.ids.tolist())


def test_a_named_loader_is_used(node: str) -> None:
    """--loader is used without a probe, since the node may start later."""
    with open_source(Source(loader="tcp://127.0.0.1:1")) as used:
        assert used == Endpoint("tcp://127.0.0.1:1", "Batches come from the node at tcp://127.0.0.1:1.", timeout_s=None)


def test_keys_reach_the_named_loader(tmp_path: Path) -> None:
    """The loader receives the key files and reports a missing one."""
    source = Source(
        loader="tcp://127.0.0.1:1", server_key=str(tmp_path / "no.pub"), client_key=str(tmp_path / "no.key")
    )
    with open_source(source) as used, pytest.raises(LoaderServiceError, match=r"no\.(pub|key)"):
        Feed(used, "train", "train", 32, CPU)


def test_a_node_at_the_usual_address_is_used(node: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With neither --loader nor --data, a node that answers at the default address is used."""
    monkeypatch.setattr(defaults, "ADDRESS", node)
    with open_source(Source()) as used:
        assert used == Endpoint(node, f"Batches come from the node that answers at {node}.", timeout_s=None)


def test_keys_reach_the_node_at_the_usual_address(node: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The probe of the default address uses the key files and reports a missing one."""
    monkeypatch.setattr(defaults, "ADDRESS", node)
    source = Source(server_key=str(tmp_path / "no.pub"), client_key=str(tmp_path / "no.key"))
    with pytest.raises(LoaderServiceError, match=r"no\.(pub|key)"), open_source(source):
        pytest.fail("it was asked without keys")


def test_else_a_private_node_serves(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, dataset_dir: Path) -> None:
    """Without an answer at the default address, a private node on the default folder serves, and stops afterwards."""
    started: list[LocalNode] = []

    @contextmanager
    def private(data: str, workers: int) -> Iterator[LocalNode]:
        assert (data, workers) == (str(dataset_dir), 1)
        with LocalNode(data=data, workers=workers) as running:
            started.append(running)
            yield running

    monkeypatch.setattr(defaults, "ADDRESS", f"ipc://{tmp_path}/nobody")
    monkeypatch.setattr(defaults, "DATA", str(dataset_dir))
    monkeypatch.setattr(feed, "_PROBE_S", 0.05)
    monkeypatch.setattr(feed, "LocalNode", private)
    with open_source(Source(workers=1)) as used:
        assert describe(used.address).count == 300
        assert used.address == started[0].address
        assert used.about == f"Batches come from a private node on {dataset_dir} with 1 worker."


def test_another_users_node_counts_as_absent(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, dataset_dir: Path
) -> None:
    """A node with another user's keys at the default address is not used, and the sentence says so; one of this user is."""
    monkeypatch.setattr(defaults, "DATA", str(dataset_dir))
    with LocalNode(dataset_dir, workers=1, bind="tcp://127.0.0.1:*") as running:
        monkeypatch.setattr(defaults, "ADDRESS", running.address)
        with open_source(Source(workers=1)) as used:
            assert used.address == running.address
        monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "other"))  # from here on this is another user
        with open_source(Source(workers=1)) as used:
            assert used.address.startswith("ipc://")
            assert used.about.startswith(
                f"Batches come from a private node on {dataset_dir} with 1 worker. The default "
            )
            assert "does not prove this user's key" in used.about
            assert used.describe().count == 300
        named = Source(loader=running.address, timeout_s=20.0)
        with open_source(named) as used, pytest.raises(KeyRefused, match="give its server_key and client_key"):
            Feed(used, "train", "train", 32, CPU)


def test_an_insecure_node_is_used_only_on_request(monkeypatch: pytest.MonkeyPatch, dataset_dir: Path) -> None:
    """A node without keys counts as absent, too, unless --insecure asks for one."""
    monkeypatch.setattr(defaults, "DATA", str(dataset_dir))
    with LocalNode(dataset_dir, workers=1, bind="tcp://127.0.0.1:*", options=("--insecure",)) as running:
        monkeypatch.setattr(defaults, "ADDRESS", running.address)
        with open_source(Source(workers=1)) as used:
            assert used.address != running.address
        with open_source(Source(insecure=True)) as used:
            assert (used.address, used.describe().count) == (running.address, 300)


def test_keys_that_cannot_be_made_need_no_default_node(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, dataset_dir: Path
) -> None:
    """A user who can have no keys trains from a private node, which needs none."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(defaults, "DATA", str(dataset_dir))
    with open_source(Source(workers=1)) as used:
        assert used.describe().count == 300
        assert "set XDG_CONFIG_HOME" in used.about


def facts(side: int, crop: int) -> Facts:
    """Return facts about a dataset with records of ``side`` pixels."""
    return Facts(1, ("ant",), "", torch.zeros(side, side, 3), crop)


def test_any_picture_can_be_loaded(tmp_path: Path) -> None:
    """An image's short side is resized to the records' side, then its centre is cropped."""
    Image.new("RGB", (640, 480), (10, 20, 30)).save(tmp_path / "p.png")
    pixels, windows = load_image(tmp_path / "p.png", facts(256, 224))
    assert pixels.shape == (1, 224, 224, 3)
    assert pixels[0, 100, 100].tolist() == [10, 20, 30]
    assert (windows.y[0], windows.x[0], windows.flip[0]) == (16, 16, False)
    pixels, windows = load_image(tmp_path / "p.png", facts(96, 71))
    assert pixels.shape == (1, 71, 71, 3)
    assert (windows.y[0], windows.x[0], windows.flip[0]) == (12, 12, False)


def test_a_file_that_is_no_picture_is_said(tmp_path: Path) -> None:
    """The error names the file."""
    (tmp_path / "p.png").write_text("no picture")
    with pytest.raises(PictureError, match=r"p\.png"):
        load_image(tmp_path / "p.png", facts(256, 224))


def test_a_private_node_that_died_is_not_waited_for(dataset_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dead private node is an error after a timeout, since only the trainer could restart it."""
    monkeypatch.setattr(feed, "_PRIVATE_TIMEOUT_S", 0.3)
    with open_source(Source(data=str(dataset_dir), workers=1)) as used:
        assert used.timeout_s == 0.3
    with pytest.raises(NoNodeError):
        Feed(used, "train", "train", 32, CPU)
