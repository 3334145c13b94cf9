"""Figures: kernels by tower, learning curves, and the confusion matrix."""

from __future__ import annotations

from base64 import b64decode
from io import BytesIO
from pathlib import Path
from xml.etree import ElementTree

import msgspec
import numpy as np
from PIL import Image

from trainer.model.alexnet import AlexNet
from trainer.run import plots
from trainer.run.folder import RunFolder
from trainer.run.progress import EpochRecord, StepRecord


def step(number: int, loss: float) -> StepRecord:
    return StepRecord(number, 0, 32 * number, loss, 0.5, 0.01, 100.0, 0.0)


def test_kernel_picture_shows_both_towers() -> None:
    """Each tower is a block of three rows of 16 kernels; zero is grey and the largest weight white."""
    tower = np.zeros((48, 3, 11, 11), np.float32)
    tower[0, 0] = 0.5
    picture = plots.kernel_picture([tower, tower])
    pitch = 11 * 4 + 4
    assert picture.shape == (2 * (3 * pitch + 4) + 24, 16 * pitch + 4, 3)
    assert picture[4, 4].tolist() == [255, 128, 128]
    assert picture[4, 4 + pitch].tolist() == [128, 128, 128]
    assert picture[3 * pitch + 4 + 24 + 4, 4].tolist() == [255, 128, 128]


def test_curves_are_svg_with_every_line() -> None:
    """Two panels have five curves within their axes."""
    epochs = [EpochRecord(0, 10, 1.0, 0.5, 1.2, 0.4, 0.1, 0.01)]
    root = ElementTree.fromstring(plots.learning_curves([step(1, 2.0), step(10, 1.0)], epochs))
    lines = root.findall(".//{http://www.w3.org/2000/svg}polyline")
    assert len(lines) == 5
    assert lines[0].get("points") == "42.0,0.0 420.0,130.0"


def test_curves_of_nothing_are_still_svg() -> None:
    """A run without log lines gives a valid document."""
    ElementTree.fromstring(plots.learning_curves([], []))


def test_a_log_with_a_torn_line_and_steps_made_again(tmp_path: Path) -> None:
    """The last version of a repeated step counts, and a truncated line is skipped."""
    lines = [msgspec.json.encode(record) for record in (step(1, 2.0), step(2, 9.0), step(2, 1.0))]
    (tmp_path / "log.jsonl").write_bytes(b"\n".join([*lines, b'{"event":"start"}', b'{"event":"st']))
    steps, epochs = plots.read_log(tmp_path / "log.jsonl")
    assert [(record.step, record.loss) for record in steps] == [(1, 2.0), (2, 1.0)]
    assert epochs == []


def test_draw_writes_both(tmp_path: Path) -> None:
    """Both figures are readable files in the run's folder."""
    folder = RunFolder.create(tmp_path / "run", tmp_path)
    folder.append(step(1, 2.0))
    kernels, curves = plots.draw(folder, [tower.conv1.weight for tower in AlexNet(2, width=0.05).each_tower])
    with Image.open(kernels) as picture:
        assert picture.mode == "RGB"
    assert ElementTree.parse(curves).getroot().tag.endswith("svg")
    assert sorted(path.name for path in folder.path.iterdir()) == [
        "curves.svg",
        "kernels.png",
        "log.jsonl",
    ]


def test_confusion_is_a_cell_for_each_pair() -> None:
    """Right guesses are green, wrong ones red, darker with the class's share; names are escaped."""
    root = ElementTree.fromstring(plots.confusion_svg([[4, 0], [1, 3]], ["a & b", "c"]))
    [image] = root.findall("{http://www.w3.org/2000/svg}image")
    cells = np.asarray(Image.open(BytesIO(b64decode(image.attrib["href"].split(",")[1]))))
    assert cells.tolist() == [[[26, 127, 55], [255, 255, 255]], [[243, 200, 203], [83, 159, 105]]]
    words = [text.text for text in root.iter("{http://www.w3.org/2000/svg}text")]
    assert words[1:] == ["a & b", "a & b", "c", "c"]
    assert str(words[0]).endswith("8 images")


def test_many_classes_have_no_names() -> None:
    """A matrix of a thousand classes has no names; a class without images has white cells."""
    root = ElementTree.fromstring(plots.confusion_svg(np.zeros((1000, 1000), int).tolist(), ["n"] * 1000))
    assert len(list(root.iter("{http://www.w3.org/2000/svg}text"))) == 1
