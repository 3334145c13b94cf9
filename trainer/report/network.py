"""The network as figure 2 of the paper draws it, measured on the model itself by one forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from math import sqrt
from typing import Any, Final

import torch
from torch import Tensor, nn

from trainer.model.ablation import Ablation
from trainer.model.alexnet import POOLING_SIDES, AlexNet
from trainer.report.drawing import BLUE, GREY, ORANGE, SKY, TIMES, WIDTH_PX, YELLOW, Figure, drawing, places

_TOP_PX: Final = 66  # of the first tower; the names of the layers are above
_TOWER_PX: Final = 150
_WORDS_PX: Final = 92
_SIDE_EDGE: Final = "#24496e"
_DEPTH: Final = 0.34
"""Length of the edges that go away from the reader, as a share of a volume's side."""


@dataclass(frozen=True)
class Layer:
    """A layer of the network; the input and the output of one tower.

    Fields:
        name: ``input``, ``conv1`` to ``fc8``.
        towers: number of towers that have a part of it.
        read, made: shapes of one image's input and output in each tower, as (channels, height, width) or (units,).
        kernel: side and stride of a convolution; None for others.
        parameters: weights and biases, of all towers.
        exchanged: True if each tower reads the outputs of all towers.
        then: operations that follow.
    """

    name: str
    towers: int
    read: tuple[int, ...]
    made: tuple[int, ...]
    kernel: tuple[int, int] | None
    parameters: int
    exchanged: bool
    then: str


def measure(model: AlexNet, crop: int) -> list[Layer]:
    """Return the layers of a model, the input first, as a forward pass of one image shows them.

    Args:
        model: network with all towers in this process.
        crop: side of its input, in pixels.
    """
    seen: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}

    def note(name: str, _layer: nn.Module, given: tuple[Tensor, ...], made: Tensor) -> None:
        seen[name] = (tuple(given[0].shape[1:]), tuple(made.shape[1:]))

    first = dict(model.each_tower[0].named_children())
    modules = first | ({"fc8": model.fc8} if model.fc8 is not None else {})
    handles = [module.register_forward_hook(partial(note, name)) for name, module in modules.items()]
    was_training = model.training
    try:
        with torch.inference_mode():
            model.eval()(torch.zeros(1, 3, crop, crop, device=model.devices[0]))
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    towers = len(model.each_tower)
    found = [Layer("input", 1, (), (3, crop, crop), None, 0, False, "minus the mean image")]
    channels = 3
    for name, module in modules.items():
        read, made = seen[name]
        parts = 1 if name == "fc8" else towers
        kernel = (module.kernel_size[0], module.stride[0]) if isinstance(module, nn.Conv2d) else None
        parameters = parts * sum(parameter.numel() for parameter in module.parameters())
        exchanged = towers > 1 and (not kernel or read[0] > channels)
        found.append(Layer(name, parts, read, made, kernel, parameters, exchanged, _then(name, first, model.ablation)))
        channels = made[0]
    return found


def _then(name: str, present: dict[str, nn.Module], ablation: Ablation) -> str:
    """Return the operations after a layer, in a few words."""
    if name == "fc8":
        return "softmax"
    words = ["tanh" if ablation.activation == "tanh" else "ReLU"]
    if name in ("conv1", "conv2") and ablation.lrn:
        words.append("LRN")
    convolutions = [each for each in present if each.startswith("conv")]
    if name in ("conv1", "conv2") or name == convolutions[-1]:
        words.append(f"pool {POOLING_SIDES[ablation.pooling]}")
    if name in ("fc6", "fc7") and ablation.dropout:
        words.append("dropout")
    return ", ".join(words)


def figure(model: AlexNet, crop: int) -> Figure:
    """Return the drawing of a model, with sizes and parameters."""
    layers = measure(model, crop)
    total, towers = sum(layer.parameters for layer in layers), len(model.each_tower)
    ways = (
        "Orange lines are exchanges between the two towers; elsewhere a tower reads its own maps. "
        if towers > 1
        else ""
    )
    return Figure(
        name="network",
        title="The network",
        caption=f"Measured on the model itself, with {total:,} parameters (figure 2 of the paper). Boxes are the outputs of a "
        f"layer in one tower: height is the side of the maps, width their number. {ways}Below each layer: the size of its "
        "output in each tower, its kernels and their stride, the operations that follow, and the parameters of all towers.",
        alt=f"{towers} towers, {total:,} parameters: "
        + "; ".join(f"{layer.name} {_size(layer)}" + (", exchanged" if layer.exchanged else "") for layer in layers),
        spec=_draw(layers, towers),
        data=[{field: getattr(layer, field) for field in Layer.__dataclass_fields__} for layer in layers],
        table=_table(layers, total),
    )


def _table(layers: Sequence[Layer], total: int) -> list[list[str]]:
    rows = [["layer", "output of a tower", "kernels", "then", "parameters"]]
    rows += [[layer.name, _size(layer), _kernel(layer), layer.then, f"{layer.parameters:,}"] for layer in layers]
    return [*rows, ["all", "", "", "", f"{total:,}"]]


def _size(layer: Layer) -> str:
    return (
        TIMES.join(str(n) for n in (*layer.made[1:], layer.made[0]))
        if len(layer.made) == 3
        else f"{layer.made[0]} units"
    )


def _kernel(layer: Layer) -> str:
    if not layer.kernel:
        return ""
    side, stride = layer.kernel
    return f"{side}{TIMES.strip()}{side}" + (f", stride {stride}" if stride > 1 else "")


@dataclass(frozen=True)
class _Box:
    """A volume at its place: left edge and middle of the front, its width, height and depth, all in pixels."""

    left: float
    middle: float
    width: float
    height: float
    depth: float

    @property
    def entry(self) -> tuple[float, float]:
        return self.left, self.middle

    @property
    def exit(self) -> tuple[float, float]:
        return self.left + self.width + self.depth / 2, self.middle - self.depth / 2


def _box(layer: Layer, left: float, middle: float) -> _Box:
    if len(layer.made) == 1:
        return _Box(left, middle, 12, 40 + min(80.0, 1.6 * sqrt(layer.made[0])), 8)
    side = 14 + min(106.0, 7.2 * sqrt(layer.made[1]))
    width = 3 if layer.name == "input" else 6 + min(40.0, 1.9 * sqrt(layer.made[0]))
    return _Box(left, middle, width, side * 0.8, side * _DEPTH)


def _draw(layers: Sequence[Layer], towers: int) -> dict[str, Any]:
    pitch = WIDTH_PX / len(layers)
    middles = [_TOP_PX + _TOWER_PX * (tower + 0.5) for tower in range(towers)]
    centre = sum(middles) / towers
    boxes = []
    for column, layer in enumerate(layers):
        where = middles if layer.towers == towers else [centre]
        left = column * pitch + 12
        boxes.append([_box(layer, left, middle) for middle in where])
    faces = [
        point
        for column, parts in enumerate(boxes)
        for n, box in enumerate(parts)
        for point in _faces(box, layers[column], f"{column}-{n}")
    ]
    lines = [
        line for column in range(1, len(layers)) for line in _lines(boxes[column - 1], boxes[column], layers[column])
    ]
    bottom = _TOP_PX + _TOWER_PX * towers + 8
    names = [{"x": column * pitch + 4, "y": 16, "text": layer.name} for column, layer in enumerate(layers)]
    words = []
    for column, layer in enumerate(layers):
        parameters = f"{layer.parameters:,}" if layer.parameters else ""
        for row, text in enumerate((_size(layer), _kernel(layer), *_folded(layer.then), parameters)):
            words.append({"x": column * pitch + 4, "y": bottom + 14 + 17 * row, "text": text})
    titles = [
        {"x": 0.9 * pitch, "y": middle - _TOWER_PX / 2 + 8, "text": f"tower {n}"} for n, middle in enumerate(middles)
    ]
    return drawing(
        [
            places(lines, "rule", strokeWidth=1.6),
            places(faces, "line", filled=True, stroke=_SIDE_EDGE, strokeWidth=0.8, strokeJoin="round"),
            places(names, "text", align="left", baseline="middle", fontSize=14, fontWeight=600),
            places(words, "text", align="left", baseline="middle", fontSize=11),
            *(
                [places(titles, "text", align="left", baseline="middle", fontSize=12, fontStyle="italic")]
                if towers > 1
                else ()
            ),
        ],
        WIDTH_PX,
        bottom + _WORDS_PX,
    )


def _folded(words: str) -> tuple[str, str]:
    """Divide the operations that follow a layer into two short lines."""
    if len(words) <= 13:
        return words, ""
    cut = words.rfind(" ", 0, 14)
    return words[:cut], words[cut + 1 :]


def _faces(box: _Box, layer: Layer, name: str) -> list[dict[str, Any]]:
    """Return the outlines of the three visible faces: front, top and right."""
    x0, x1, dx = box.left, box.left + box.width, box.depth / 2
    y0, y1, dy = box.middle - box.height / 2, box.middle + box.height / 2, box.depth / 2
    front, top, side = (YELLOW, "#f3c34d", "#b87f00") if layer.name == "input" else (SKY, "#a9d8f2", BLUE)
    if len(layer.made) == 1:
        front, top, side = ("#7fcdb4", "#b5e3d4", "#009E73")
    outlines = {
        "front": (front, [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]),
        "top": (top, [(x0, y0), (x0 + dx, y0 - dy), (x1 + dx, y0 - dy), (x1, y0)]),
        "side": (side, [(x1, y0), (x1 + dx, y0 - dy), (x1 + dx, y1 - dy), (x1, y1)]),
    }
    return [
        {"outline": f"{name}-{face}", "order": order, "x": x, "y": y, "fill": fill}
        for face, (fill, corners) in outlines.items()
        for order, (x, y) in enumerate([*corners, corners[0]])
    ]


def _lines(before: Sequence[_Box], after: Sequence[_Box], layer: Layer) -> list[dict[str, Any]]:
    """Return the lines from the outputs that a layer reads to its own boxes."""
    lines = []
    for to, target in enumerate(after):
        for of, source in enumerate(before):
            own = of == to or len(before) == 1 or len(after) == 1
            if not own and not layer.exchanged:
                continue
            crossing = layer.exchanged and (of != to or len(after) == 1)
            (x, y), (x2, y2) = source.exit, target.entry
            lines.append({"x": x, "y": y, "x2": x2, "y2": y2, "stroke": ORANGE if crossing else GREY})
    return lines
