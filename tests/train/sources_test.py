"""Sources give the records that their files hold, the same in every process, or say what is missing."""

import io
import itertools
import pickle
import struct
import sys
from pathlib import Path

import numpy as np
import pytest

from train import data, sources
from train.workers import Reader


def take(count: int, source: data.Source, **options) -> list[data.Record]:
    iterator = data.batches(source, **options)
    result = list(itertools.islice(iterator, count))
    iterator.close()
    return result


def assert_same(first: list[data.Record], second: list[data.Record]) -> None:
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            assert one[name].dtype == other[name].dtype
            np.testing.assert_array_equal(one[name], other[name])


def assert_whole(source: data.Source, **options) -> None:
    """Check what every source promises: a digest, pickling, batches that processes and workers do not change."""
    assert isinstance(source, data.Source)
    assert source.name
    copy = pickle.loads(pickle.dumps(source))
    assert len(copy) == len(source)
    assert copy.digest() == source.digest()
    assert_same([copy[i] for i in range(len(copy))], [source[i] for i in range(len(source))])
    options = {"batch_size": 4, "seed": 5, **options}
    straight = take(4, source, **options)
    assert_same(take(2, source, start=2, workers=2, **options), straight[2:])
    for processes in (2, 4):
        parts = [
            take(2, source, start=2, process_index=p, process_count=processes, **options) for p in range(processes)
        ]
        joined = [{n: np.concatenate([part[n] for part in same]) for n in same[0]} for same in zip(*parts, strict=True)]
        assert_same(joined, straight[2:])


# ------------------------------------------------------------------------------------------------------ sources


def test_digits_are_a_fixed_stratified_split() -> None:
    train, test = data.digits("train"), data.digits("test")
    assert (len(train), len(test)) == (1198, 599)
    counts = [np.bincount([source[i]["label"] for i in range(len(source))]) for source in (train, test)]
    assert counts[1].tolist() == [59, 61, 59, 61, 60, 61, 60, 60, 58, 60]
    np.testing.assert_allclose(counts[1] / (counts[0] + counts[1]), 1 / 3, atol=0.002)
    record = test[0]
    assert record["image"].shape == (8, 8, 1)
    assert record["image"].dtype == np.float32
    assert record["label"].shape == ()
    assert record["label"].dtype == np.int32
    # Which third it is must never change: results of different runs would not compare.
    assert data.fingerprint(test, batch_size=1, seed=0, transform=None)["content"] == (
        "84c686a4b4d8ab766399ca8c2eee8c997d44e675ca46d91a6536012e2a4973e7"
    )


def test_digits_split_loses_and_repeats_nothing() -> None:
    from sklearn.datasets import load_digits

    images = [s[i]["image"] for s in (data.digits("train"), data.digits("test")) for i in range(len(s))]
    stacked = np.stack(images)
    assert stacked.min() == 0
    assert stacked.max() == 1
    ours = sorted((stacked.reshape(1797, 64) * 16).astype(int).tolist())
    assert ours == sorted(load_digits().data.astype(int).tolist())
    assert len({tuple(row) for row in ours}) == 1797  # all images differ, so the halves are disjoint


def test_wrong_sources_are_refused() -> None:
    with pytest.raises(ValueError, match="split='validation' must be 'train' or 'test'"):
        data.digits("validation")
    with pytest.raises(ValueError, match=r"same length of at least 1, got shapes {'a': \(3,\), 'b': \(4,\)}"):
        data.arrays(a=np.zeros(3), b=np.zeros(4))
    for columns in ({}, {"a": np.zeros((0, 3))}, {"a": np.float32(1)}):
        with pytest.raises(ValueError, match="same length of at least 1"):
            data.arrays(**columns)


# --------------------------------------------------------------------------------------------------------- TFDS


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve small PNGs and their labels as a TFDS dataset in array_record files, written without TensorFlow."""
    import PIL.Image
    import tensorflow_datasets

    directory = tmp_path_factory.mktemp("tfds")

    class TinyPictures(tensorflow_datasets.core.GeneratorBasedBuilder):
        __module__ = "tiny_pictures"  # TFDS would look for download checksums beside the package of the module
        VERSION = tensorflow_datasets.core.Version("1.0.0")

        def _info(self):
            features = tensorflow_datasets.features
            return tensorflow_datasets.core.DatasetInfo(
                builder=self,
                features=features.FeaturesDict(
                    {
                        "image": features.Image(shape=(4, 4, 3)),
                        "label": features.ClassLabel(num_classes=3),
                        "name": features.Text(),
                    }
                ),
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for number in range(12):
                file = io.BytesIO()
                PIL.Image.fromarray(picture(number)).save(file, format="PNG")
                yield number, {"image": file.getvalue(), "label": number % 3, "name": f"n{number}"}

    TinyPictures(data_dir=directory, file_format="array_record").download_and_prepare()
    return directory


def picture(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (4, 4, 3), np.uint8)


def as_float(record: data.Record) -> data.Record:
    return {**record, "image": record["image"].astype(np.float32) / 255}


def test_tfds_is_read_without_tensorflow(prepared: Path) -> None:
    source = data.tfds("tiny_pictures", "train", prepared)
    assert len(source) == 12
    # TFDS writes records in an order of its own; their content is what counts.
    records = {source[i]["name"].item().decode(): source[i] for i in range(12)}
    for number in range(12):
        np.testing.assert_array_equal(records[f"n{number}"]["image"], picture(number))
        assert records[f"n{number}"]["label"] == number % 3
    assert "tensorflow" not in sys.modules


def test_tfds_batches_resume_and_split_like_any_other(prepared: Path) -> None:
    source = data.tfds("tiny_pictures:1.0.0", "train[:10]", prepared, columns=["image", "label"], prepare=as_float)
    options = {"batch_size": 4, "seed": 1, "transform": data.random_affine()}
    straight = take(5, source, **options)
    assert straight[0]["image"].shape == (4, 4, 4, 3)
    assert straight[0]["image"].dtype == np.float32
    assert straight[0].keys() == {"image", "label"}
    assert_same(take(3, source, start=2, **options), straight[2:])
    halves = [take(5, source, process_index=p, process_count=2, **options) for p in (0, 1)]
    joined = [{n: np.concatenate([a[n], b[n]]) for n in a} for a, b in zip(*halves, strict=True)]
    assert_same(joined, straight)
    evaluated = list(data.evaluation_batches(source, batch_size=4))
    assert sum(batch["weight"].sum() for batch in evaluated) == 10


def test_tfds_fingerprint_knows_split_and_preparation(prepared: Path) -> None:
    def fingerprint(split: str, **options) -> str:
        source = data.tfds("tiny_pictures", split, prepared, **options)
        return data.fingerprint(source, batch_size=2, seed=0, transform=None)["content"]

    assert fingerprint("train") == fingerprint("train")
    variants = {fingerprint("train"), fingerprint("train[:9]"), fingerprint("train", columns=["image"])}
    assert len(variants | {fingerprint("train", prepare=as_float)}) == 4


def test_a_missing_dataset_says_how_to_get_it(tmp_path: Path, prepared: Path) -> None:
    with pytest.raises(FileNotFoundError) as raised:
        data.tfds("mnist", "train", tmp_path)
    assert f"dataset 'mnist' must be prepared in {tmp_path}, got no files there" in str(raised.value)
    command = f"python -c \"import tensorflow_datasets as t; t.data_source('mnist', data_dir={str(tmp_path)!r})\""
    assert command in str(raised.value)
    compile(command.split('"')[1], "command", "exec")
    with pytest.raises(FileNotFoundError, match="dataset 'mnits' must be known to TFDS .* did you mean .*mnist"):
        data.tfds("mnits", "train", tmp_path)
    with pytest.raises(ValueError, match=r"split='test' must be one of \['train'\] or a slice"):
        data.tfds("tiny_pictures", "test", prepared)
    with pytest.raises(ValueError, match=r"columns=\['image', 'mask'\] must be among .*; drop \['mask'\]"):
        data.tfds("tiny_pictures", "train", prepared, columns=["image", "mask"])


@pytest.mark.parametrize(("processes", "workers"), [(1, 2), (2, 0), (2, 2), (4, 0), (4, 1)])
def test_tfds_gives_the_same_global_batches_however_it_is_read(prepared: Path, processes: int, workers: int) -> None:
    source = data.tfds("tiny_pictures", "train", prepared, columns=["image", "label"], prepare=as_float)
    options = {"batch_size": 4, "seed": 1, "transform": data.random_affine()}
    straight = take(6, source, **options)
    rows = 4 // processes
    for p in {0, processes - 1}:
        share = {"process_index": p, "process_count": processes, "workers": workers}
        expected = [{n: value[p * rows : (p + 1) * rows] for n, value in batch.items()} for batch in straight[3:]]
        assert_same(take(3, source, start=3, **share, **options), expected)


@pytest.mark.parametrize(
    ("name", "split", "shape"),
    [("imagenet2012", "validation", None), ("cifar10", "test", (32, 32, 3)), ("mnist", "test", (28, 28, 1))],
)
def test_well_known_datasets_are_read_by_name_or_asked_for(name: str, split: str, shape, tmp_path: Path) -> None:
    import tensorflow_datasets

    command = f"t.data_source.'{name}', data_dir='{tmp_path}'"
    with pytest.raises(FileNotFoundError, match=f"dataset '{name}' must be prepared in {tmp_path}, .*{command}"):
        data.tfds(name, split, tmp_path)
    with tensorflow_datasets.testing.mock_data(num_examples=5):
        examples = tensorflow_datasets.builder(name).as_data_source(split=split)
        source = sources._Prepared(name, split, ("image", "label"), None, str(tmp_path), name)
        source.__dict__["examples"] = examples  # made up, but decoded by the features of the dataset
        batch = next(data.evaluation_batches(source, batch_size=1))
    assert batch["image"].dtype == np.uint8
    assert batch["image"].shape[-1] in (1, 3)
    assert shape is None or batch["image"].shape == (1, *shape)
    assert batch["label"].shape == (1,)


# ------------------------------------------------------------------------------------------------------------ images


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine PNGs in three classes, one of them in a folder of its own within its class."""
    import PIL.Image

    root = tmp_path_factory.mktemp("pictures")
    for number in range(9):
        path = root / ("ape", "bee", "cat")[number % 3] / ("deep" if number == 4 else ".") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(picture(number)).save(path)
    (root / "ape" / "notes.txt").write_text("not an image")
    (root / "ape" / ".hidden.png").write_text("nor is this")
    return root


def test_an_image_folder_is_read_by_class_in_order(pictures: Path) -> None:
    source = data.image_folder(pictures)
    assert source.classes == ("ape", "bee", "cat")
    assert source.files == tuple(
        f"{name}/{file}.png"
        for name, files in (("ape", "036"), ("bee", ("1", "7", "deep/4")), ("cat", "258"))
        for file in files
    )
    for index, number in enumerate((0, 3, 6, 1, 7, 4, 2, 5, 8)):
        np.testing.assert_array_equal(source[index]["image"], picture(number))
        assert source[index]["label"] == number % 3
        assert source[index]["label"].dtype == np.int32
    assert_whole(source)
    grey = data.image_folder(pictures, mode="L")[0]["image"]
    assert grey.shape == (4, 4, 1)
    luma = picture(0) @ np.array([0.299, 0.587, 0.114])
    assert np.abs(grey[..., 0] - luma).max() <= 1


def test_image_folder_classes_can_be_given(pictures: Path) -> None:
    source = data.image_folder(pictures, classes=("cat", "dog", "bee", "ape"))
    assert source.classes == ("cat", "dog", "bee", "ape")
    assert [int(source[i]["label"]) for i in range(9)] == [0] * 3 + [2] * 3 + [3] * 3
    with pytest.raises(ValueError, match=r"must name every subfolder of .*; add \['cat'\]"):
        data.image_folder(pictures, classes=("ape", "bee"))
    with pytest.raises(ValueError, match="must differ from one another"):
        data.image_folder(pictures, classes=("ape", "ape"))


def test_a_missing_image_folder_says_what_it_should_be(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    with pytest.raises(
        FileNotFoundError, match=rf"{missing}/<class>/<image>.jpg\), got nothing there; .*mkdir -p {missing} && tar"
    ):
        data.image_folder(missing)
    with pytest.raises(FileNotFoundError, match="must hold one subfolder a class .* got none"):
        data.image_folder(tmp_path)
    (tmp_path / "train").mkdir()
    with pytest.raises(ValueError, match=r"got the splits \['train'\]; pass path='.*/train'"):
        data.image_folder(tmp_path)
    (tmp_path / "ape").mkdir()
    with pytest.raises(FileNotFoundError, match="class folder .*ape must hold images .* got none"):
        data.image_folder(tmp_path)


def test_image_folder_fingerprint_knows_names_labels_and_content(tmp_path: Path) -> None:
    import PIL.Image

    def write(number: int, path: str) -> None:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(picture(number)).save(tmp_path / path)

    write(0, "a/0.png")
    write(1, "b/1.png")
    digests = [data.image_folder(tmp_path).digest(), data.image_folder(tmp_path, mode="L").digest()]
    digests.append(data.image_folder(tmp_path, classes=("b", "a")).digest())
    write(2, "b/1.png")
    digests.append(data.image_folder(tmp_path).digest())
    (tmp_path / "b/1.png").rename(tmp_path / "b/2.png")
    digests.append(data.image_folder(tmp_path).digest())
    write(1, "b/2.png")
    (tmp_path / "b/2.png").rename(tmp_path / "b/1.png")
    assert data.image_folder(tmp_path).digest() == digests[0]
    assert len(set(digests)) == 5


@pytest.mark.parametrize("workers", [0, 1])
def test_a_truncated_image_is_named_or_skipped(tmp_path: Path, workers: int) -> None:
    import PIL.Image

    for number in range(4):
        (tmp_path / "a").mkdir(exist_ok=True)
        PIL.Image.fromarray(picture(number)).save(tmp_path / "a" / f"{number}.png")
    broken = tmp_path / "a" / "2.png"
    broken.write_bytes(broken.read_bytes()[:50])
    source = data.image_folder(tmp_path)
    with pytest.raises(RuntimeError, match="record 2 of image_folder.'.*'. could not be read"):
        list(data.evaluation_batches(source, batch_size=4, workers=workers))
    (batch,) = data.evaluation_batches(source, batch_size=4, workers=workers, on_corrupt="skip")
    assert batch["weight"].tolist() == [1, 1, 0, 1]
    np.testing.assert_array_equal(batch["image"], np.stack([picture(n) for n in (0, 1, 3, 3)]))


# ------------------------------------------------------------------------------------------------------------ tables

ROWS = 12
AGE = np.arange(ROWS) * 1.5
SIZE = np.arange(ROWS)[::-1].copy()
CITY = np.array(["Rome", "Oslo", "Bern"] * 4)
PRICE = np.linspace(0, 1, ROWS)


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import pyarrow
    import pyarrow.csv
    import pyarrow.parquet

    root = tmp_path_factory.mktemp("tables")
    table = pyarrow.table({"age": AGE, "size": SIZE, "city": CITY, "price": PRICE, "pair": list(np.eye(ROWS, 2))})
    pyarrow.parquet.write_table(table, root / "t.parquet")
    (root / "parts").mkdir()
    pyarrow.parquet.write_table(table.slice(0, 5), root / "parts" / "0.parquet")
    pyarrow.parquet.write_table(table.slice(5), root / "parts" / "1.parquet")
    pyarrow.csv.write_csv(table.drop_columns("pair"), root / "t.csv")
    np.savez(root / "t.npz", age=AGE, size=SIZE, city=CITY, price=PRICE)
    np.save(
        root / "t.npy",
        np.array(list(zip(AGE, SIZE, CITY, PRICE, strict=True)), "f8,i8,U4,f8").astype(
            [("age", "f8"), ("size", "i8"), ("city", "U4"), ("price", "f8")]
        ),
    )
    np.save(root / "plain.npy", np.stack([AGE, SIZE, PRICE], axis=1))
    return root


@pytest.mark.parametrize("file", ["t.parquet", "parts", "t.csv", "t.npz", "t.npy"])
def test_every_kind_of_table_gives_the_same_records(tables: Path, file: str) -> None:
    source = data.table(tables / file, numeric=("age", "size"), categorical=("city",), target="price")
    assert len(source) == ROWS
    assert source.categories == {"city": ("Bern", "Oslo", "Rome")}
    for index in range(ROWS):
        record = source[index]
        assert {name: value.dtype for name, value in record.items()} == {
            "numeric": np.float32, "categorical": np.int32, "target": np.float32
        }  # fmt: skip
        np.testing.assert_array_equal(record["numeric"], np.float32([AGE[index], SIZE[index]]))
        assert record["categorical"].tolist() == [(2, 1, 0)[index % 3]]
        assert record["target"] == np.float32(PRICE[index])
    reference = data.table(tables / "t.npz", numeric=("age", "size"), categorical=("city",), target="price")
    assert source.digest() == reference.digest()
    if file != "t.npz":
        assert_whole(source)


def test_targets_are_numbers_classes_or_codes(tables: Path) -> None:
    file = tables / "t.parquet"
    assert data.table(file, target="size")[0]["target"].tolist() == 11
    assert data.table(file, target="size")[0]["target"].dtype == np.int32
    by_name = data.table(file, target="city")
    assert (by_name[0]["target"], by_name.categories["city"]) == (2, ("Bern", "Oslo", "Rome"))
    given = data.table(file, target="city", categories={"city": ("Rome", "Oslo", "Bern", "Paris")}, rows=slice(6, None))
    assert (len(given), given[0]["target"]) == (6, 0)


def test_a_table_without_roles_keeps_its_columns(tables: Path) -> None:
    record = data.table(tables / "t.parquet")[3]
    assert record.keys() == {"age", "size", "city", "price", "pair"}
    assert record["age"] == AGE[3]
    assert record["city"] == "Rome"
    np.testing.assert_array_equal(record["pair"], np.eye(ROWS, 2)[3])


def test_a_plain_array_is_mapped_and_not_loaded(tables: Path) -> None:
    source = data.table(tables / "plain.npy")
    np.testing.assert_array_equal(source[4]["values"], [AGE[4], SIZE[4], PRICE[4]])
    assert isinstance(source._opened[0]["values"], np.memmap)
    assert len(pickle.dumps(source)) < 1000
    picked = data.table(tables / "plain.npy", numeric=("2", "0"), target="1")
    np.testing.assert_array_equal(picked[4]["numeric"], np.float32([PRICE[4], AGE[4]]))
    assert isinstance(picked._opened[0]["numeric"].matrix, np.memmap)
    assert_whole(picked)


def test_wrong_tables_are_refused(tables: Path, tmp_path: Path) -> None:
    (tmp_path / "gaps.csv").write_text("a,b\n1,x\n,y\n3,\n")
    file = tables / "t.parquet"
    for make, kind, message in (
        (
            lambda: data.table(tmp_path / "no.csv"),
            FileNotFoundError,
            "no.csv must be a file .* got nothing there; write it with",
        ),
        (lambda: data.table(__file__), ValueError, "must end in one of .csv"),
        (lambda: data.table(file, numeric=("aeg",)), ValueError, "has no column 'aeg'; did you mean 'age'"),
        (lambda: data.table(file, numeric=("city",)), ValueError, "column 'city' .* must hold numbers"),
        (
            lambda: data.table(file, categorical=("city",), categories={"city": ("Rome", "Oslo")}),
            ValueError,
            "holds Bern, not",
        ),
        (lambda: data.table(file, rows=slice(40, 50)), ValueError, "at least one row"),
        (lambda: data.table(tmp_path / "gaps.csv", numeric=("a",)), ValueError, "has 1 missing numbers; set missing"),
    ):
        with pytest.raises(kind, match=message):
            make()
    filled = data.table(tmp_path / "gaps.csv", numeric=("a",), missing=-1.0)
    assert [float(filled[i]["numeric"][0]) for i in range(3)] == [1, -1, 3]


# ------------------------------------------------------------------------------------------------------ point clouds


def cloud(number: int) -> np.ndarray:
    return np.random.default_rng(number).normal(size=(3 + 2 * number, 3)).astype(np.float32)


def test_point_clouds_are_padded_and_masked() -> None:
    source = data.point_clouds([cloud(n) for n in range(4)], labels=[0, 1, 1, 0])
    for number in range(4):
        record = source[number]
        assert record["points"].shape == (9, 3)
        assert record["points"].dtype == np.float32
        assert record["mask"].tolist() == [True] * (3 + 2 * number) + [False] * (6 - 2 * number)
        np.testing.assert_array_equal(record["points"][record["mask"]], cloud(number))
        assert (record["points"][~record["mask"]] == 0).all()
        assert record["label"] == (0, 1, 1, 0)[number]
    assert_whole(source)


def test_a_cloud_with_too_many_points_is_thinned_evenly() -> None:
    points = np.arange(30.0).reshape(10, 3)
    record = data.point_clouds([{"points": points, "features": points[:, :1], "id": 7}], num_points=4)[0]
    np.testing.assert_array_equal(record["points"], points[[0, 3, 6, 9]])
    np.testing.assert_array_equal(record["features"], points[[0, 3, 6, 9], :1])
    assert record["mask"].all()
    assert record["id"] == 7


def test_point_clouds_fall_into_the_smallest_bucket_that_holds_them() -> None:
    buckets = data.point_cloud_buckets([cloud(n) for n in (3, 0, 2, 1, 4)], (6, 9, 20), labels=range(5))
    assert {size: len(source) for size, source in buckets.items()} == {6: 2, 9: 2, 20: 1}
    found = {}
    for size, source in buckets.items():
        for index in range(len(source)):
            record = source[index]
            assert record["points"].shape == (size, 3)
            found[int(record["label"])] = int(record["mask"].sum())
    assert found == {0: 9, 1: 3, 2: 7, 3: 5, 4: 11}
    with pytest.raises(ValueError, match="sizes must hold at least one"):
        data.point_cloud_buckets([cloud(0)], ())


def write_cloud(path: Path, points: np.ndarray) -> None:
    """Writes a cloud in the format of the ending, with a triangle where the format has faces."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = "".join(" ".join(f"{value:.9g}" for value in row) + "\n" for row in points)
    if path.suffix == ".npy":
        np.save(path, points)
    elif path.suffix == ".npz":
        np.savez(path, points=points)
    elif path.suffix == ".off":
        joined = path.stem.startswith("joined")  # as in some files of ModelNet
        path.write_text(f"OFF{'' if joined else chr(10)}{len(points)} 1 0\n{rows}3 0 1 2\n")
    else:
        kind = path.stem.rsplit("-")[-1]
        header = (
            f"ply\nformat {kind} 1.0\ncomment x\nelement vertex {len(points)}\nproperty float x\nproperty float y\n"
            "property float z\nproperty uchar red\nproperty uchar green\nproperty uchar blue\n"
            "element face 1\nproperty list uchar int vertex_indices\nend_header\n"
        )
        if kind == "ascii":
            body = "".join(f"{line} 1 2 {n}\n" for n, line in enumerate(rows.splitlines())) + "3 0 1 2\n"
            path.write_text(header + body)
        else:
            order = "<" if "little" in kind else ">"
            body = b"".join(struct.pack(f"{order}3f3B", *row, 1, 2, n) for n, row in enumerate(points.tolist()))
            path.write_bytes(header.encode() + body + struct.pack(f"{order}B3i", 3, 0, 1, 2))


def test_every_format_of_point_clouds_gives_the_same_points(tmp_path: Path) -> None:
    files = (
        "a.npy",
        "b.npz",
        "c.off",
        "joined.off",
        "p-ascii.ply",
        "p-binary_big_endian.ply",
        "p-binary_little_endian.ply",
    )
    for name in files:
        write_cloud(tmp_path / "flat" / name, cloud(2))
    source = data.point_clouds(tmp_path / "flat", num_points=8)
    assert len(source) == len(files)
    for index in range(len(files)):
        record = source[index]
        np.testing.assert_array_equal(record["points"][:7], cloud(2))
        assert record["mask"].tolist() == [True] * 7 + [False]
        assert "label" not in record
        if "ply" in files[index]:
            np.testing.assert_array_equal(record["colors"][:7], [[1, 2, n] for n in range(7)])


def test_point_cloud_folders_name_classes(tmp_path: Path) -> None:
    for number in range(6):
        write_cloud(tmp_path / ("chair", "table")[number % 2] / f"{number}.off", cloud(number))
    source = data.point_clouds(tmp_path)
    assert source.classes == ("chair", "table")
    assert [int(source[i]["label"]) for i in range(6)] == [0, 0, 0, 1, 1, 1]
    assert source[0]["points"].shape == (13, 3)
    assert_whole(source)


def test_wrong_point_clouds_are_refused(tmp_path: Path) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "x.ply").write_text("ply\nformat ascii 1.0\n")
    (tmp_path / "empty").mkdir()
    for make, kind, message in (
        (
            lambda: data.point_clouds(tmp_path / "none"),
            FileNotFoundError,
            "must exist and hold .* got nothing there; unpack",
        ),
        (
            lambda: data.point_clouds(tmp_path / "empty"),
            FileNotFoundError,
            "must hold .npy, .npz, .off, .ply files, got none",
        ),
        (lambda: data.point_clouds(tmp_path / "bad"), ValueError, "must be a PLY file with a complete header"),
        (lambda: data.point_clouds([]), ValueError, "at least one cloud"),
        (
            lambda: data.point_clouds([cloud(0)], labels=[1, 2]),
            ValueError,
            r"labels must have one entry a cloud \(1\), got 2",
        ),
        (lambda: data.point_clouds([cloud(0)], num_points=0), ValueError, "num_points=0"),
        (lambda: data.point_clouds([{"x": cloud(0)}]), ValueError, "must have points"),
        (
            lambda: data.point_clouds([{"points": cloud(0), "features": cloud(1)}]),
            ValueError,
            "one row of 'features' a point",
        ),
    ):
        with pytest.raises(kind, match=message):
            make()


# ------------------------------------------------------------------------------------------------------------ graphs


def graph(number: int) -> dict[str, np.ndarray]:
    """A path of nodes, its edges in both directions."""
    generator = np.random.default_rng(number)
    nodes = 3 + number
    ahead = np.arange(nodes - 1)
    return {
        "nodes": generator.normal(size=(nodes, 2)).astype(np.float32),
        "positions": generator.normal(size=(nodes, 3)).astype(np.float32),
        "edges": generator.normal(size=(2 * (nodes - 1), 4)).astype(np.float32),
        "senders": np.concatenate([ahead, ahead + 1]),
        "receivers": np.concatenate([ahead + 1, ahead]),
        "globals": np.float32([number, 0]),
    }


def test_graphs_are_padded_and_masked() -> None:
    source = data.graphs([graph(n) for n in range(4)], max_nodes=8, max_edges=12, labels=np.arange(4) / 2)
    for number in range(4):
        record, original = source[number], graph(number)
        assert record["node_mask"].sum() == 3 + number
        assert record["edge_mask"].sum() == 4 + 2 * number
        for name in ("nodes", "positions"):
            np.testing.assert_array_equal(record[name][record["node_mask"]], original[name])
            assert (record[name][~record["node_mask"]] == 0).all()
        for name in ("edges", "senders", "receivers"):
            np.testing.assert_array_equal(record[name][record["edge_mask"]], original[name])
        assert record["senders"].dtype == record["receivers"].dtype == np.int32
        # Padding edges join padding nodes: a sum that forgets the mask changes no real node.
        assert not record["node_mask"][record["receivers"][~record["edge_mask"]]].any()
        np.testing.assert_array_equal(record["globals"], [number, 0])
        assert record["label"] == number / 2
    assert_whole(source)
    tight = data.graphs([graph(n) for n in range(4)])
    assert tight[0]["nodes"].shape == (6, 2)
    assert tight[0]["edges"].shape == (10, 4)


def test_graph_folders_are_read(tmp_path: Path) -> None:
    for number in range(4):
        folder = tmp_path / ("odd" if number % 2 else "even")
        folder.mkdir(exist_ok=True)
        np.savez(folder / f"{number}.npz", **graph(number))
    source = data.graphs(tmp_path)
    assert source.classes == ("even", "odd")
    assert [int(source[i]["label"]) for i in range(4)] == [0, 0, 1, 1]
    np.testing.assert_array_equal(source[1]["nodes"][:5], graph(2)["nodes"])
    assert_whole(source)


def test_wrong_graphs_are_refused(tmp_path: Path) -> None:
    def changed(**entries):
        return [{name: value for name, value in {**graph(0), **entries}.items() if value is not None}]

    for make, kind, message in (
        (lambda: data.graphs(tmp_path), FileNotFoundError, "graph folder .* must hold .npz files, got none"),
        (lambda: data.graphs([]), ValueError, "at least one graph"),
        (lambda: data.graphs(changed(senders=None)), ValueError, "must have senders, receivers and one of"),
        (lambda: data.graphs(changed(receivers=np.arange(3))), ValueError, "must have 4 rows of 'receivers', got 3"),
        (lambda: data.graphs(changed(senders=np.full(4, 3))), ValueError, r"must join nodes 0..2, got 0..3"),
        (
            lambda: data.graphs(changed(positions=np.zeros((2, 3)))),
            ValueError,
            "must have 3 rows of 'positions', got 2",
        ),
        (
            lambda: data.graphs([graph(3)], max_nodes=5)[0],
            ValueError,
            "has 6 nodes and 10 edges, more than max_nodes=5",
        ),
        (lambda: data.graphs([graph(0)], max_edges=0), ValueError, "max_edges=0 must be at least 1"),
    ):
        with pytest.raises(kind, match=message):
            make()


# ------------------------------------------------------------------------------------------------------ descriptions


def test_sources_of_ones_own_are_read_and_digested_without_a_word() -> None:
    squares = [{"x": np.asarray(i * i)} for i in range(5)]
    assert sources.digest(squares) != sources.digest(squares[1:])
    assert sources.name_of(squares) == "list"
    assert Reader(squares, None, "stop")(type("Row", (), {"index": 2, "weight": None})(), print)["x"] == 4


def test_descriptions_tell_parameters_apart_and_hold_no_addresses() -> None:
    def make(value):
        return lambda record, generator: (record, value)[0]

    def recursive(n):
        return recursive(n - 1) if n else make

    class Bound:
        def __init__(self, value):
            self.value = value

        def method(self):
            return self.value

    values = [
        None,
        make(1),
        make(2),
        make([1, 2]),
        make(np.arange(2)),
        make(np.arange(3)),
        make(make(1)),
        make(make(2)),
        len,
        np.sin,
        Bound(1).method,
        {"a": make(1)},
        (make(1),),
        frozenset({1, 2}),
        np.float32,
        Path("x"),
        recursive,
    ]
    texts = [sources.describe(value) for value in values]
    assert len(set(texts)) == len(texts)
    assert not any(" at 0x" in text for text in texts)
