"""The whole command preprocesses every layout of images."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from scipy.io import savemat

from loader_service.data.image_file import load_picture
from loader_service.data.records import Records

Preprocess = Callable[..., Result]
RecordsBySource = dict[str, tuple[str, bytes]]


def tar_of(members: Mapping[str, bytes]) -> bytes:
    """Return an uncompressed tar archive."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return out.getvalue()


@pytest.fixture(scope="module")
def pictures(album: Path) -> dict[str, bytes]:
    """Return six image files in two classes, by CLASS/NAME."""
    return {
        f"{name}/{i}.jpg": (album / "train" / name / f"00{i}.jpg").read_bytes()
        for name in ("ant", "bee")
        for i in range(3)
    }


def records_of(out: Path, split: str) -> RecordsBySource:
    """Return class name and pixels of every record, by source."""
    with Records(out / f"{split}.lmdb") as records:
        found = {}
        for number in range(len(records)):
            label, pixels = records.pixels(number)
            found[records.source(number)] = (records.manifest.class_names[label], pixels.tobytes())
        return found


def expected(pictures: Mapping[str, tuple[str, bytes]]) -> RecordsBySource:
    """Return the expected records of these files, given by source as class name and content."""
    return {source: (name, load_picture(content).tobytes()) for source, (name, content) in pictures.items()}


def by_folder(pictures: Mapping[str, bytes]) -> dict[str, tuple[str, bytes]]:
    """Return files with their folders as classes."""
    return {source: (source.split("/")[0], content) for source, content in pictures.items()}


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
def test_an_archive_with_both_splits(
    suffix: str, pictures: dict[str, bytes], tmp_path: Path, preprocess: Preprocess
) -> None:
    """train/ and test/ in a tar, compressed or not, become both environments; a second run is up to date."""
    members = {f"{split}/{name}": content for split in ("train", "test") for name, content in pictures.items()}
    content = tar_of(members)
    source, out = tmp_path / f"all{suffix}", tmp_path / "out"
    source.write_bytes(gzip.compress(content) if suffix.endswith("gz") else content)
    assert preprocess(source, out).exit_code == 0
    assert records_of(out, "train") == records_of(out, "val") == expected(by_folder(pictures))
    assert "up to date" in preprocess(source, out).output
    assert sorted(path.name for path in out.iterdir()) == ["train.lmdb", "val.lmdb"]


def test_imagenet_as_distributed(pictures: dict[str, bytes], tmp_path: Path, preprocess: Preprocess) -> None:
    """The tar of tars, the flat validation archive and a table of its labels are used as distributed."""
    wordnet = {"ant": "n02219486", "bee": "n02206856"}
    source, out = tmp_path / "imagenet", tmp_path / "out"
    source.mkdir()
    inner, train = {}, {}
    for name, wnid in wordnet.items():
        members = {f"{wnid}_{i}.JPEG": pictures[f"{name}/{i}.jpg"] for i in range(3)}
        inner[f"{wnid}.tar"] = tar_of(members)
        train |= {f"{wnid}/{member}": (wnid, content) for member, content in members.items()}
    (source / "ILSVRC2012_img_train.tar").write_bytes(tar_of(inner))
    files = list(pictures.values())[1:4]
    val = {f"ILSVRC2012_val_0000000{i}.JPEG": (wordnet["ant" if i < 2 else "bee"], f) for i, f in enumerate(files)}
    (source / "ILSVRC2012_img_val.tar").write_bytes(tar_of({name: content for name, (_, content) in val.items()}))
    result = preprocess(source, out)
    assert result.exit_code == 3
    assert "the labels of its validation images are missing: add LOC_val_solution.csv or" in result.output
    rows = [f"{name.removesuffix('.JPEG')},{wnid} 1 2 3 4 {wnid} 5 6 7 8" for name, (wnid, _) in val.items()]
    (source / "LOC_val_solution.csv").write_text("\n".join(["ImageId,PredictionString", *rows]))
    assert preprocess(source, out).exit_code == 0
    assert records_of(out, "train") == expected(train)
    assert records_of(out, "val") == expected(val)
    (source / "LOC_val_solution.csv").write_text(rows[0])
    assert "has no label for ILSVRC2012_val_00000001.JPEG and 1 others" in preprocess(source, tmp_path / "no").output


WORDNET = {"ant": "n02219486", "bee": "n02206856"}


def devkit(ground_truth: str, numbers: Mapping[str, int]) -> dict[str, bytes]:
    """Return the two needed files of the development kit, with numbers by WordNet id and one synset that is no class."""
    synsets = np.array(
        [(number, wnid, "words", 0) for wnid, number in numbers.items()] + [(1001, "n00001740", "entity", 2)],
        [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("num_children", "O")],
    )
    meta = io.BytesIO()
    savemat(meta, {"synsets": synsets[:, None]}, do_compression=True)
    folder = "ILSVRC2012_devkit_t12/data"
    return {
        f"{folder}/meta.mat": meta.getvalue(),
        f"{folder}/ILSVRC2012_validation_ground_truth.txt": ground_truth.encode(),
    }


def imagenet(source: Path, pictures: Mapping[str, bytes]) -> dict[str, tuple[str, bytes]]:
    """Write ImageNet's archives without validation labels; validation is the first three images, of ants. Return their records."""
    source.mkdir()
    members = {
        wnid: {f"{wnid}_{i}.JPEG": pictures[f"{name}/{i}.jpg"] for i in range(3)} for name, wnid in WORDNET.items()
    }
    inner = {f"{wnid}.tar": tar_of(content) for wnid, content in members.items()}
    (source / "ILSVRC2012_img_train.tar").write_bytes(tar_of(inner))
    val = {f"ILSVRC2012_val_0000000{i + 1}.JPEG": content for i, content in enumerate(list(pictures.values())[:3])}
    (source / "ILSVRC2012_img_val.tar").write_bytes(tar_of(val))
    return {name: (WORDNET["ant"], content) for name, content in val.items()}


@pytest.mark.parametrize("packed", [True, False])
def test_imagenet_with_its_development_kit(
    packed: bool, pictures: dict[str, bytes], tmp_path: Path, preprocess: Preprocess
) -> None:
    """The kit, packed or unpacked, gives validation images the labels of the training split."""
    source, out = tmp_path / "imagenet", tmp_path / "out"
    val = imagenet(source, pictures)
    files = devkit("490\n490\n490\n", {WORDNET["ant"]: 490, WORDNET["bee"]: 17})
    if packed:
        (source / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(gzip.compress(tar_of(files)))
    else:
        for name, content in files.items():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes(content)
    result = preprocess(source, out)
    assert result.exit_code == 0, result.output
    assert records_of(out, "val") == expected(val)
    with Records(out / "val.lmdb") as records:
        assert records.manifest.class_names == tuple(sorted(WORDNET.values()))


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("ILSVRC2012_devkit_t12.tar.gz", b"no archive", "cannot be read"),
        (
            "ILSVRC2012_devkit_t12.tar.gz",
            gzip.compress(tar_of({"x": b""})),
            "holds no ILSVRC2012_validation_ground_truth.txt",
        ),
        ("ILSVRC2012_validation_ground_truth.txt", b"1\n1\n1\n", "put the kit's meta.mat next to it"),
        ("k.tar", tar_of(devkit("1\n1\n", {"n1": 1})), "is not the kit's"),
        (
            "k.tar",
            tar_of(devkit("1\n1\n", {"n02219486": 1})),
            "has 2 lines, and none of them is for ILSVRC2012_val_00000003.JPEG",
        ),
        ("k.tar", tar_of(devkit("1\n2\n1\n", {"n02219486": 1})), "line 2 of"),
        ("k.tar", tar_of(devkit("1\nx\n1\n", {"n02219486": 1})), "is 'x', which is no class of meta.mat"),
        ("k.tar", tar_of(devkit("1\n", {"n02219486": 1}) | {"data/meta.mat": b"MATLAB"}), "is not the kit's"),
    ],
    # The same in all processes of pytest-xdist: a gzip file, pytest's own name for it, has a time in it.
    ids=[
        "no archive",
        "no labels",
        "no classes",
        "other classes",
        "few lines",
        "unknown class",
        "no number",
        "no MATLAB",
    ],
)
def test_a_development_kit_that_cannot_be_right_is_refused(
    name: str, content: bytes, sentence: str, pictures: dict[str, bytes], tmp_path: Path, preprocess: Preprocess
) -> None:
    """The error names what is damaged or missing in the kit; no label is guessed."""
    imagenet(tmp_path / "imagenet", pictures)
    (tmp_path / "imagenet" / name).write_bytes(content)
    result = preprocess(tmp_path / "imagenet", tmp_path / "out")
    assert result.exit_code == 3
    assert sentence in " ".join(result.output.split())


def test_a_list_of_what_is_for_validation(album: Path, tmp_path: Path, preprocess: Preprocess) -> None:
    """--val-list makes the named images validation; unknown names and a second option for validation are refused."""
    chosen = ["ant/003.jpg", "cat/011.jpg", "cat/012.jpg"]
    names = tmp_path / "val.txt"
    names.write_text("\n".join(["./ant/003.jpg", *chosen[1:], ""]))
    assert preprocess(album / "train", tmp_path / "out", "--val-list", str(names)).exit_code == 0
    assert records_of(tmp_path / "out", "val").keys() == set(chosen)
    assert len(records_of(tmp_path / "out", "train")) == 78 - 3
    names.write_text("ant/003.jpg\nant/999.jpg\n")
    for options, code, sentence in (
        ((), 3, "1 of its 2 names are not in SRC, the first is 'ant/999.jpg'"),
        (("--val-fraction", "0.5"), 2, "no --val-list with it"),
        (("--val", str(album / "val")), 2, "no --val with it"),
    ):
        result = preprocess(album / "train", tmp_path / "no", "--val-list", str(names), *options)
        assert result.exit_code == code
        assert sentence in " ".join(result.output.split())
    names.write_text("\n")
    assert "leaves one split empty" in preprocess(album / "train", tmp_path / "no", "--val-list", str(names)).output


def test_imagenet_from_kaggle(pictures: dict[str, bytes], tmp_path: Path, preprocess: Preprocess) -> None:
    """Kaggle's folders and its table of labels are detected."""
    root = tmp_path / "kaggle"
    for name, content in pictures.items():
        path = root / "ILSVRC" / "Data" / "CLS-LOC" / "train" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    (root / "ILSVRC" / "Data" / "CLS-LOC" / "val").mkdir()
    (root / "ILSVRC" / "Data" / "CLS-LOC" / "val" / "v1.JPEG").write_bytes(pictures["ant/0.jpg"])
    (root / "LOC_val_solution.csv").write_text("ImageId,PredictionString\nv1,bee 1 2 3 4\n")
    assert preprocess(root, tmp_path / "out").exit_code == 0
    assert records_of(tmp_path / "out", "train") == expected(by_folder(pictures))
    assert records_of(tmp_path / "out", "val") == expected({"v1.JPEG": ("bee", pictures["ant/0.jpg"])})


def test_webdataset_shards(pictures: dict[str, bytes], tmp_path: Path, preprocess: Preprocess) -> None:
    """Files of one key are a sample, shards named val are validation, and class numbers keep their order."""
    root = tmp_path / "shards"
    root.mkdir()
    for shard, split in enumerate(("train-000", "train-001", "val-000")):
        members: dict[str, bytes] = {}
        for i, content in enumerate(list(pictures.values())[2 * shard : 2 * shard + 2]):
            members |= {f"s{i}.jpg": content, f"s{i}.cls": b"%d" % (9 + i), f"s{i}.json": b"{}"}
        (root / f"{split}.tar").write_bytes(tar_of(members))
    assert preprocess(root, tmp_path / "out").exit_code == 0
    files = list(pictures.values())
    assert records_of(tmp_path / "out", "train") == expected(
        {f"train-00{s}/s{i}.jpg": (f"{9 + i:06d}", files[2 * s + i]) for s in range(2) for i in range(2)}
    )
    assert records_of(tmp_path / "out", "val") == expected(
        {f"val-000/s{i}.jpg": (f"{9 + i:06d}", files[4 + i]) for i in range(2)}
    )
    with Records(tmp_path / "out" / "val.lmdb") as records:
        assert records.manifest.class_names == ("000009", "000010")


def test_cifar_batches(tmp_path: Path, preprocess: Preprocess) -> None:
    """CIFAR-10's planar records become the same records as the images that they encode."""
    root = tmp_path / "cifar-10-batches-bin"
    root.mkdir()
    (root / "batches.meta.txt").write_text("plane\ncar\n\n")
    rng = np.random.Generator(np.random.Philox(key=1))
    planes = rng.integers(0, 256, (6, 3, 32, 32), np.uint8)
    rows = [bytes([i % 2]) + planes[i].tobytes() for i in range(6)]
    for name, batch in (("data_batch_1", rows[:2]), ("data_batch_2", rows[2:4]), ("test_batch", rows[4:])):
        (root / f"{name}.bin").write_bytes(b"".join(batch))
    assert preprocess(root, tmp_path / "out").exit_code == 0

    def record(i: int) -> tuple[str, bytes]:
        pixels = planes[i].transpose(1, 2, 0).tobytes()
        return ("plane", "car")[i % 2], load_picture(b"P6 32 32 255\n" + pixels).tobytes()

    names = [f"data_batch_{batch}.bin/0000{i}" for batch in (1, 2) for i in range(2)]
    assert records_of(tmp_path / "out", "train") == {name: record(i) for i, name in enumerate(names)}
    assert records_of(tmp_path / "out", "val") == {f"test_batch.bin/0000{i}": record(4 + i) for i in range(2)}
    (root / "data_batch_2.bin").write_bytes(b"".join(rows)[:-1])
    assert "does not consist of records of 3073 bytes" in preprocess(root, tmp_path / "no").output


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
def test_a_table_of_paths_and_labels(
    suffix: str, pictures: dict[str, bytes], tmp_path: Path, preprocess: Preprocess
) -> None:
    """Rows or JSON lines give paths, relative to the table, and classes; a missing file is rejected by name."""
    rows = [(f"files/{i}, x.bin", name.split("/")[0], content) for i, (name, content) in enumerate(pictures.items())]
    (tmp_path / "files").mkdir()
    for path, _, content in rows:
        (tmp_path / path).write_bytes(content)
    table = tmp_path / f"all{suffix}"
    listed = [*((path, label) for path, label, _ in rows), ("files/gone.jpg", "ant")]
    if suffix == ".jsonl":
        table.write_text("\n".join(json.dumps({"path": path, "label": label}) for path, label in listed))
    else:
        separator = "," if suffix == ".csv" else "\t"
        table.write_text(f"path{separator}label\n" + "".join(f'"{path}"{separator}{label}\n' for path, label in listed))
    assert preprocess(table, tmp_path / "out", "--val-fraction", "0").exit_code == 0
    assert records_of(tmp_path / "out", "train") == expected({path: (label, content) for path, label, content in rows})
    with Records(tmp_path / "out" / "train.lmdb") as records:
        assert [bad.source for bad in records.manifest.rejected] == ["files/gone.jpg"]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("x.csv", "a.jpg\n", "row 1 has no label"),
        ("x.csv", ",ant\n", "row 1 has no path"),
        ("x.csv", "a.jpg,ant\na.jpg,bee\n", "it names the same path twice"),
        ("x.jsonl", '{"path": 1}', "a line is not JSON with path and label"),
        ("x.csv", "", "it holds no files"),
        ("x.tar.gz", "not gzip", "cannot be read as a tar archive"),
    ],
)
def test_a_damaged_source_is_refused(
    name: str, content: str, sentence: str, tmp_path: Path, preprocess: Preprocess
) -> None:
    """The error for an invalid table names the row or the file."""
    (tmp_path / name).write_text(content)
    result = preprocess(tmp_path / name, tmp_path / "out")
    assert result.exit_code == 3
    assert sentence in result.output
    assert name in result.output


def test_half_a_compressed_archive_is_refused(
    pictures: dict[str, bytes], tmp_path: Path, preprocess: Preprocess
) -> None:
    """A compressed archive that is cut off is an error that leaves nothing behind."""
    source = tmp_path / "x.tar.gz"
    source.write_bytes(gzip.compress(tar_of(pictures))[:-2000])
    result = preprocess(source, tmp_path / "out")
    assert result.exit_code == 3
    assert "cannot be read or decompressed" in result.output
    assert list((tmp_path / "out").iterdir()) == []


def test_only_the_classes_that_are_asked_for(album: Path, tmp_path: Path, preprocess: Preprocess) -> None:
    """--classes uses a subset of the classes, with new labels, in both splits."""
    assert preprocess(album, tmp_path, "--classes", "cat, bee").exit_code == 0
    for split in ("train", "val"):
        with Records(tmp_path / f"{split}.lmdb") as records:
            assert records.manifest.class_names == ("bee", "cat")
    result = preprocess(album, tmp_path, "--classes", "cat,dog")
    assert result.exit_code == 2
    assert "there is no class 'dog'" in result.output


def test_a_named_layout_must_be_there(album: Path, tmp_path: Path, preprocess: Preprocess) -> None:
    """A source that does not have the layout of --layout is refused."""
    result = preprocess(album, tmp_path, "--layout", "cifar")
    assert result.exit_code == 3
    assert "it does not have the layout 'cifar'" in result.output


def test_a_damaged_compressed_archive(tmp_path: Path, preprocess: Callable[..., Result]) -> None:
    """Damaged bytes within a gzip archive give a sentence and exit code 3, as an archive that is cut off does."""
    content = bytearray(
        gzip.compress(tar_of({f"ant/{number}.jpg": bytes(range(number, number + 200)) * 3 for number in range(20)}))
    )
    content[200:260] = b"\xff" * 60
    source = tmp_path / "x.tar.gz"
    source.write_bytes(content)
    result = preprocess(source, tmp_path / "out")
    assert result.exit_code == 3, result.output
    assert "cannot be read or decompressed" in " ".join(result.output.split())
