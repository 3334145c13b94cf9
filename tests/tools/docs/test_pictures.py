"""The pictures of README and docs: there, of free photographs, and with their licences."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tools.docs.pictures import FREE, SHOWN, TARGET
from tools.photographs import PACKAGE_LICENCE, PHOTOGRAPHS
from tools.terminal import ROOT

PICTURES = sorted((ROOT / TARGET).glob("*.svg"))


def test_every_picture_is_there_and_shown() -> None:
    """The folder has the pictures that the command makes, and the page of the report shows each of them."""
    assert [path.stem for path in PICTURES] == sorted([*SHOWN, "network"])
    shown = re.findall(r"\]\(pictures/(\w+)\.svg\)", (ROOT / "docs" / "report.md").read_text(encoding="utf-8"))
    assert sorted(shown) == [path.stem for path in PICTURES]
    for name in re.findall(r'src="([^"]+)"', (ROOT / "README.md").read_text(encoding="utf-8")):
        assert (ROOT / name).is_file(), name


@pytest.mark.parametrize("path", PICTURES, ids=lambda path: path.stem)
def test_a_picture_is_whole(path: Path) -> None:
    """Each picture is a well-formed document that loads nothing."""
    document = path.read_text(encoding="utf-8")
    assert ElementTree.fromstring(document).tag.endswith("svg")
    assert not re.search(r'href="(?!data:|#)', document)


def test_only_photographs_with_a_licence_of_their_own_are_shown() -> None:
    """No class without one is in a picture, and the origin and licence of all others stand beside the pictures."""
    licences = (ROOT / TARGET / "LICENSES.md").read_text(encoding="utf-8")
    text = "".join(path.read_text(encoding="utf-8") for path in PICTURES)
    for photograph in PHOTOGRAPHS:
        assert (f"| {photograph.label} |" in licences) == (photograph in FREE)
        if photograph.licence == PACKAGE_LICENCE:
            assert not re.search(rf">{photograph.label}\b", text), photograph.label
        else:
            assert photograph.licence in licences
