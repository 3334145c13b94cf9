"""The study of archives: the command's time, compared with decoding and resizing alone."""

from __future__ import annotations

import tarfile
from io import BytesIO
from pathlib import Path

from click.testing import CliRunner
from PIL import Image

from tools.bench.studies.archives import COLUMNS, main


def test_a_row_for_each_archive(tmp_path: Path) -> None:
    """Every image counts, the ratio is that of the two rates, and no file is left behind."""
    image = BytesIO()
    Image.new("RGB", (60, 40), "teal").save(image, "JPEG")
    with tarfile.open(tmp_path / "few.tar.gz", "w:gz") as archive:
        for number in range(40):
            member = tarfile.TarInfo(f"class{number % 2}/{number}.jpg")
            member.size = image.tell()
            archive.addfile(member, BytesIO(image.getvalue()))
    result = CliRunner().invoke(main, [str(tmp_path / "few.tar.gz"), "--size", "32", "--workers", "1"])
    assert result.exit_code == 0, result.output
    cells = [cell.strip() for cell in result.output.splitlines()[-1].strip("|").split("|")]
    row = dict(zip(COLUMNS, cells, strict=True))
    assert (row["archive"], row["images"], row["size"]) == ("few.tar.gz", "40", "32")
    rate, alone = (float(row[name].replace(",", "")) for name in ("images/s", "decode + resize alone"))
    assert 0 < rate < alone
    assert abs(float(row["ratio"]) - rate / alone) < 0.02
    assert [path.name for path in tmp_path.iterdir()] == ["few.tar.gz"]
