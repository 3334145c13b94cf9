"""Archives through the command, timed beside decoding and resizing alone."""

from __future__ import annotations

import tarfile
from io import BytesIO
from pathlib import Path

from click.testing import CliRunner
from PIL import Image

from tools.bench.studies.archives import COLUMNS, main


def test_a_row_for_each_archive(tmp_path: Path) -> None:
    """Every picture counts, and the ratio is that of the two rates beside it; nothing is left behind."""
    picture = BytesIO()
    Image.new("RGB", (60, 40), "teal").save(picture, "JPEG")
    with tarfile.open(tmp_path / "few.tar.gz", "w:gz") as archive:
        for number in range(40):
            member = tarfile.TarInfo(f"class{number % 2}/{number}.jpg")
            member.size = picture.tell()
            archive.addfile(member, BytesIO(picture.getvalue()))
    result = CliRunner().invoke(main, [str(tmp_path / "few.tar.gz"), "--size", "32", "--workers", "1"])
    assert result.exit_code == 0, result.output
    cells = [cell.strip() for cell in result.output.splitlines()[-1].strip("|").split("|")]
    row = dict(zip(COLUMNS, cells, strict=True))
    assert (row["archive"], row["pictures"], row["size"]) == ("few.tar.gz", "40", "32")
    rate, alone = (float(row[name].replace(",", "")) for name in ("pictures/s", "decode + resize alone"))
    assert 0 < rate < alone
    assert abs(float(row["ratio"]) - rate / alone) < 0.02
    assert [path.name for path in tmp_path.iterdir()] == ["few.tar.gz"]
