"""The network: its golden numbers, its two towers, and its initial weights."""

from __future__ import annotations

import math
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from torch.nn import functional

from loader_service.data.image_file import load_picture
from trainer.errors import ConfigError
from trainer.model.ablation import Ablation
from trainer.model.alexnet import AlexNet, Sizes
from trainer.model.rng import DropoutKey
from trainer.model.speed import REFERENCE, Speed
from trainer.optimizer import PaperSGD

PER_LAYER = {
    "conv1": 34_944,
    "conv2": 307_456,
    "conv3": 885_120,
    "conv4": 663_936,
    "conv5": 442_624,
    "fc6": 37_752_832,
    "fc7": 16_781_312,
    "fc8": 4_097_000,
}
MULTIPLY_ADDS = 724_406_816

PHOTOGRAPHS = Path(
    os.environ.get("IMAGENET_SAMPLE", Path(__file__).resolve().parents[4] / "shared" / "data" / "imagenet-sample.tar")
)


@pytest.fixture(scope="module")
def paper() -> AlexNet:
    return AlexNet().eval()


def parameters_of(model: AlexNet, layer: str) -> int:
    return sum(p.numel() for name, p in model.named_parameters() if layer in name.split("."))


def images(batch: int, seed: int = 0) -> torch.Tensor:
    pixels = np.random.default_rng(seed).normal(0, 60, (batch, 3, 224, 224)).astype(np.float32)
    return torch.from_numpy(pixels)


def test_parameters_of_the_paper(paper: AlexNet) -> None:
    """The network has 60,965,224 parameters; 62,378,344 would mean that the groups were forgotten."""
    assert {layer: parameters_of(paper, layer) for layer in PER_LAYER} == PER_LAYER
    assert sum(p.numel() for p in paper.parameters()) == 60_965_224


def test_parameters_of_one_tower() -> None:
    """The smaller network has half the kernels, but the full conv5 and fully connected layers."""
    assert sum(p.numel() for p in AlexNet(towers=1).parameters()) == 59_798_312


def test_map_sizes_and_multiply_adds(paper: AlexNet) -> None:
    """Maps and multiply-adds of both towers are the paper's."""
    shapes: dict[str, tuple[int, ...]] = {}
    work = 0

    def note(name: str, layer: torch.nn.Module, output: torch.Tensor) -> None:
        nonlocal work
        before = shapes.get(name, (0,))
        shapes[name] = (before[0] + output.shape[1], *output.shape[2:])
        work += layer.weight.numel() * math.prod(output.shape[2:])

    hooks = [
        layer.register_forward_hook(lambda layer, _, output, name=name: note(name.split(".")[-1], layer, output))
        for name, layer in paper.named_modules()
        if isinstance(layer, (torch.nn.Conv2d, torch.nn.Linear))
    ]
    with torch.inference_mode():
        paper(images(1))
    for hook in hooks:
        hook.remove()
    assert shapes == {
        "conv1": (96, 55, 55),
        "conv2": (256, 27, 27),
        "conv3": (384, 13, 13),
        "conv4": (384, 13, 13),
        "conv5": (256, 13, 13),
        "fc6": (4096,),
        "fc7": (4096,),
        "fc8": (1000,),
    }
    assert work == MULTIPLY_ADDS


def test_conv1_sees_zeros_only_at_the_right_and_bottom() -> None:
    """The first position of conv1 reads the image's first 11 rows and columns; zeros follow at the right and bottom."""
    tower = AlexNet(2, width=0.05).each_tower[0]
    picture = images(1)
    seen = []
    tower.conv1.register_forward_hook(lambda layer, inputs, output: seen.append((inputs[0], output)))
    with torch.inference_mode():
        tower.lower(picture)
        padded, maps = seen[0]
        first = (tower.conv1.weight * picture[:, :, :11, :11]).sum((1, 2, 3)) + tower.conv1.bias
    assert padded.shape[2:] == (227, 227)
    assert not padded[:, :, 224:].any()
    assert not padded[:, :, :, 224:].any()
    torch.testing.assert_close(maps[0, :, 0, 0], first, rtol=1e-4, atol=1e-4)


def test_towers_meet_only_where_the_paper_says() -> None:
    """Before the first exchange, tower 0's maps do not depend on tower 1's weights."""
    one, other = AlexNet(3, width=0.05).eval(), AlexNet(3, width=0.05).eval()
    with torch.no_grad():
        other.each_tower[1].conv1.weight.mul_(2)
        picture = images(2)
        assert torch.equal(one.each_tower[0].lower(picture), other.each_tower[0].lower(picture))
        assert not torch.equal(one(picture), other(picture))


@pytest.mark.parametrize("towers", [1, 2])
@pytest.mark.parametrize("preset", ["paper", "original"])
def test_every_parameter_gets_a_gradient(towers: int, preset: str) -> None:
    """Each parameter gets a gradient, in both presets, with one tower or two."""
    model = AlexNet(5, width=0.1, preset=preset, towers=towers)
    functional.cross_entropy(model(images(4), DropoutKey(0, 0)), torch.arange(4)).backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert idle == []


def losses(
    devices: tuple[str, ...], steps: int, speed: Speed = REFERENCE, preset: str = "paper", last: int = 8
) -> list[float]:
    """Return the losses of steps on batches of 8 images; the last batch has ``last``."""
    model = AlexNet(5, width=0.1, preset=preset, devices=devices, seed=3, speed=speed)
    optimizer = PaperSGD(model, model.preset, 0.01, bool(model.speed.fused_sgd))
    out = []
    for step in range(steps):
        count = last if step == steps - 1 else 8
        labels = torch.arange(count) % 5
        loss = functional.cross_entropy(model(images(count, seed=step), DropoutKey(3, step)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        out.append(loss.item())
    return out


def test_one_device_and_two_give_the_same_losses() -> None:
    """Towers on one device and on two (the CPU twice) give equal losses at each step, with dropout."""
    assert losses(("cpu",), 5) == losses(("cpu", "cpu"), 5)


def test_images_may_be_given_per_device() -> None:
    """A batch on each device gives the same logits as one tensor."""
    model, picture = AlexNet(3, width=0.05, devices=("cpu", "cpu")).eval(), images(2)
    with torch.inference_mode():
        assert torch.equal(model(picture), model([picture, picture]))


def test_dropout_is_keyed_by_step_in_training() -> None:
    """Equal keys give equal logits, another step gives others; evaluation is not random."""
    model, picture = AlexNet(3, width=0.05), images(2)
    with torch.inference_mode():
        assert torch.equal(model(picture, DropoutKey(0, 1)), model(picture, DropoutKey(0, 1)))
        assert not torch.equal(model(picture, DropoutKey(0, 1)), model(picture, DropoutKey(0, 2)))
        model.eval()
        assert torch.equal(model(picture, DropoutKey(0, 1)), model(picture, DropoutKey(0, 2)))


def test_initial_weights_and_biases(paper: AlexNet) -> None:
    """The std is .01 everywhere; biases of conv2, conv4, conv5, fc6 and fc7 start at 1, all others at 0."""
    for name, parameter in paper.named_parameters():
        layer = name.split(".")[-2]
        if name.endswith("bias"):
            expected = 1.0 if layer in {"conv2", "conv4", "conv5", "fc6", "fc7"} else 0.0
            assert (parameter == expected).all(), name
        else:
            error = 5 * 0.01 / math.sqrt(2 * parameter.numel())
            assert abs(parameter.std().item() - 0.01) < error, name


def test_original_starts_the_middle_wider() -> None:
    """Preset ``original`` draws conv3 to conv5 with std .03."""
    tower = AlexNet(10, width=0.5, preset="original", towers=1).each_tower[0]
    widening = math.sqrt(2)  # of a net of half the width
    for layer in (tower.conv3, tower.conv4, tower.conv5):
        assert layer.weight.std().item() == pytest.approx(0.03 * widening, rel=0.03)
    assert tower.fc7.weight.std().item() == pytest.approx(0.01 * widening, rel=0.03)


def test_narrow_nets_start_with_wider_weights() -> None:
    """Each std grows by sqrt(full fan-in / fan-in); conv1 reads the image, so its std stays."""
    tower = AlexNet(10, width=0.25).each_tower[0]
    assert tower.conv1.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert tower.conv3.weight.std().item() == pytest.approx(0.02, rel=0.03)
    assert tower.fc6.weight.std().item() == pytest.approx(0.02, rel=0.03)


def test_weights_hang_on_the_seed_and_not_on_devices() -> None:
    """Equal seeds give equal weights on any devices; other seeds and other towers give others."""
    one, same = AlexNet(3, width=0.05, seed=1), AlexNet(3, width=0.05, seed=1, devices=("cpu", "cpu"))
    other = AlexNet(3, width=0.05, seed=2)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not torch.equal(one.fc8.weight, other.fc8.weight)
    assert not torch.equal(one.each_tower[0].conv1.weight, one.each_tower[1].conv1.weight)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"width": 0.0}, "--width=0.0 cannot work: expected a number above 0, at most 4."),
        ({"towers": 3}, "--towers=3 cannot work: expected 1 or 2."),
        ({"preset": "caffe"}, "--preset=caffe cannot work: expected one of paper, original."),
        (
            {"towers": 1, "devices": ("cpu", "cpu")},
            "--devices=cpu,cpu cannot work: expected one device, or one for each of 1 towers.",
        ),
        (
            {"crop": 63},
            "--crop=63 cannot work: expected at least 64 pixels, or nothing is left after the last overlapping pooling.",
        ),
        (
            {"crop": 5, "ablation": Ablation(pooling="plain")},
            "--crop=5 cannot work: expected at least 36 pixels, or nothing is left after the last plain pooling.",
        ),
    ],
)
def test_impossible_networks_are_refused(options: dict[str, object], sentence: str) -> None:
    """The error names the argument, its value and the possible values."""
    with pytest.raises(ConfigError) as caught:
        AlexNet(2, **options)
    assert str(caught.value) == sentence


@pytest.mark.parametrize(("crop", "pooled"), [(64, 1), (84, 1), (112, 2), (227, 6), (256, 7)])
@pytest.mark.parametrize("pooling", ["overlapping", "plain"])
def test_other_crops_have_a_network_that_fits(crop: int, pooled: int, pooling: Literal["overlapping", "plain"]) -> None:
    """fc6 reads the maps of any crop, and gradients reach all layers; the std depends on the width alone."""
    model = AlexNet(3, width=0.05, crop=crop, ablation=Ablation(pooling=pooling))
    pictures = torch.from_numpy(np.random.default_rng(0).normal(0, 60, (2, 3, crop, crop)).astype(np.float32))
    functional.cross_entropy(model(pictures), torch.arange(2)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    inputs = model.each_tower[0].fc6.in_features
    if pooling == "overlapping":
        assert inputs == 2 * 6 * pooled**2
    full = inputs // (2 * 6) * 256  # at width 1, 256 maps of the same side
    assert model.each_tower[0].fc6.weight.std().item() == pytest.approx(0.01 * math.sqrt(full / inputs), rel=0.1)


@pytest.mark.parametrize(("width", "crop"), [(1.0, 64), (1.2, 64), (1.2, 224)])
def test_wide_nets_start_with_the_papers_weights(width: float, crop: int) -> None:
    """At width 1 and above every std is .01, whatever the crop."""
    tower = AlexNet(10, width=width, crop=crop).each_tower[0]
    for name in ("conv1", "conv2", "conv5", "fc6", "fc7"):
        assert getattr(tower, name).weight.std().item() == pytest.approx(0.01, rel=0.03), name


def test_the_narrowest_layers_have_one_kernel() -> None:
    """No width removes all kernels of a layer."""
    assert Sizes.of(2, 0.001).kernels == (1, 1, 1, 1, 1)


def spectral_noise(count: int) -> torch.Tensor:
    """Return noise with a photograph's spectrum (amplitude ~ 1 / frequency) and contrast (std 60), 0-255 minus mean."""
    rng = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(224)[:, None], np.fft.rfftfreq(224)[None, :])
    frequency[0, 0] = 1 / 224
    grey = np.fft.irfft2(np.fft.rfft2(rng.normal(size=(count, 1, 224, 224))) / frequency)
    colour = np.fft.irfft2(np.fft.rfft2(rng.normal(size=(count, 3, 224, 224))) / frequency)
    mixed = grey / grey.std() + 0.3 * colour / colour.std()
    return torch.from_numpy((60 * mixed / mixed.std()).astype(np.float32))


def photographs(count: int) -> torch.Tensor:
    """Return ImageNet photographs, minus the mean image of four times as many."""
    if not PHOTOGRAPHS.is_file():
        pytest.skip(
            f"there are no photographs at {PHOTOGRAPHS}; the variable IMAGENET_SAMPLE may name an archive of some"
        )
    with tarfile.open(PHOTOGRAPHS) as archive:
        files = [member for member in archive if member.name.lower().endswith((".jpg", ".jpeg"))][: 4 * count]
        pixels = np.stack([load_picture(archive.extractfile(file).read(), source=file.name) for file in files])
    centred = pixels.astype(np.float32) - pixels.mean(axis=0, dtype=np.float32)
    return torch.from_numpy(centred[:count, 16:240, 16:240].transpose(0, 3, 1, 2).copy())


@pytest.mark.parametrize("pictures", [spectral_noise, photographs])
@pytest.mark.parametrize(("preset", "spread"), [("paper", 0.011), ("original", 0.16)])
def test_logit_spread_at_the_start(preset: str, spread: float, pictures: Callable[[int], torch.Tensor]) -> None:
    """The std of logits across images, without dropout, is large enough to learn."""
    model = AlexNet(50, preset=preset, ablation=Ablation(dropout=False)).eval()
    with torch.inference_mode():
        assert model(pictures(24)).std(0).mean().item() == pytest.approx(spread, rel=0.3)


FAST = {
    "bf16": Speed(amp="bf16"),
    "contiguous": Speed(channels_last=False),
    "fused-norm": Speed(fused_norm=True),
    "bf16-fused": Speed(amp="bf16", fused_norm=True),
}


@pytest.mark.parametrize("preset", ["paper", "original"])
@pytest.mark.parametrize("speed", FAST.values(), ids=FAST.keys())
def test_faster_forms_learn_what_the_plain_one_does(speed: Speed, preset: str) -> None:
    """Losses of four steps with dropout agree with the plain form's: to 1e-4, and to 2 % with bfloat16."""
    plain = losses(("cpu",), 4, preset=preset)
    assert losses(("cpu",), 4, speed, preset) == pytest.approx(plain, rel=2e-2 if speed.amp == "bf16" else 1e-4)
    assert plain[-1] != pytest.approx(plain[0], rel=5e-2)  # they have learnt something that can be out


@pytest.mark.parametrize("speed", FAST.values(), ids=FAST.keys())
def test_faster_forms_give_the_same_losses_on_two_devices(speed: Speed) -> None:
    """Each form gives equal losses on one device and on two."""
    assert losses(("cpu",), 3, speed) == pytest.approx(losses(("cpu", "cpu"), 3, speed), rel=1e-6)


def test_in_bfloat16_weights_and_logits_stay_float32() -> None:
    """Autocast narrows products alone; weights, gradients and logits stay float32."""
    model = AlexNet(3, width=0.05, speed=Speed(amp="bf16"))
    logits = model(images(2), DropoutKey(0, 0))
    logits.sum().backward()
    assert logits.dtype == torch.float32
    assert {p.dtype for p in model.parameters()} == {p.grad.dtype for p in model.parameters()} == {torch.float32}
    with torch.inference_mode():
        assert not torch.equal(model(images(2), DropoutKey(0, 0)), AlexNet(3, width=0.05)(images(2), DropoutKey(0, 0)))


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")  # torch's own,
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # both of them
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="torch.compile needs a C++ compiler here")
def test_compiled_towers_learn_what_plain_ones_do() -> None:
    """Losses agree with the plain form's over full batches and a short one, on one device and two."""
    plain, compiled = losses(("cpu",), 3, last=3), losses(("cpu",), 3, Speed(compile=True, fused_norm=True), last=3)
    assert compiled == pytest.approx(plain, rel=1e-4)
    assert losses(("cpu", "cpu"), 3, Speed(compile=True, fused_norm=True), last=3) == pytest.approx(compiled, rel=1e-6)
