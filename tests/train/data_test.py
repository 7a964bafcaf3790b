"""Batches are functions of the seed and their number; every example is evaluated once."""

import functools
import io
import itertools
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from train import data

ROOT = Path(__file__).resolve().parents[2]


def noisy(record: data.Record, generator: np.random.Generator) -> data.Record:
    return {**record, "noise": generator.random(2)}


def louder(record: data.Record, generator: np.random.Generator, volume: float) -> data.Record:
    return {**record, "noise": volume * generator.random(2)}


@pytest.fixture(scope="module")
def numbers() -> data.Source:
    return data.arrays(index=np.arange(23), value=np.arange(46, dtype=np.float32).reshape(23, 2))


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


# ------------------------------------------------------------------------------------------------------ batches


def test_a_batch_depends_on_nothing_but_seed_and_number(numbers: data.Source) -> None:
    options = {"batch_size": 8, "transform": noisy}
    straight = take(9, numbers, seed=3, **options)
    assert_same(take(9, numbers, seed=3, **options), straight)
    assert_same(take(9, numbers, seed=3, threads=3, **options), straight)
    for start in (1, 2, 5, 8):  # 23 records: batches 2, 5 and 8 reach over the end of an epoch
        assert_same(take(9 - start, numbers, seed=3, start=start, **options), straight[start:])
    other = take(9, numbers, seed=4, **options)
    assert any((one["index"] != two["index"]).any() for one, two in zip(straight, other, strict=True))


def test_every_epoch_has_every_record_once_in_its_own_order(numbers: data.Source) -> None:
    stream = np.concatenate([batch["index"] for batch in take(23, numbers, batch_size=6, seed=0)])
    epochs = stream.reshape(6, 23)
    assert (np.sort(epochs, axis=1) == np.arange(23)).all()
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 6
    assert epochs[0].tolist() != list(range(23))


def test_records_stay_whole(numbers: data.Source) -> None:
    for batch in take(4, numbers, batch_size=5, seed=1):
        np.testing.assert_array_equal(batch["value"][:, 0], 2 * batch["index"])
        assert batch["value"].shape == (5, 2)
        assert batch["value"].dtype == np.float32


@pytest.mark.parametrize("processes", [2, 3, 4, 12])
def test_any_number_of_processes_assembles_the_same_global_batch(numbers: data.Source, processes: int) -> None:
    options = {"batch_size": 12, "seed": 5, "transform": noisy, "start": 1}
    whole = take(5, numbers, **options)
    parts = [take(5, numbers, process_index=p, process_count=processes, **options) for p in range(processes)]
    assembled = [
        {name: np.concatenate([part[name] for part in same_batch]) for name in same_batch[0]}
        for same_batch in zip(*parts, strict=True)
    ]
    assert_same(assembled, whole)


def test_augmentation_differs_between_records_and_epochs(numbers: data.Source) -> None:
    batches = take(6, numbers, batch_size=23, seed=0, transform=noisy)
    noise = np.concatenate([batch["noise"] for batch in batches])
    assert len({tuple(row) for row in noise.tolist()}) == len(noise)


def test_wrong_batches_are_refused_at_once(numbers: data.Source) -> None:
    for options, message in (
        ({"batch_size": 6, "process_count": 4}, "batch_size=6 must be a positive multiple of process_count=4"),
        ({"batch_size": 0}, "batch_size=0 must be a positive multiple"),
        ({"batch_size": 4, "process_index": 2, "process_count": 2}, "process_index=2 must lie in 0..process_count-1"),
        ({"batch_size": 4, "threads": 0}, "threads=0 must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            data.batches(numbers, seed=0, **options)
        with pytest.raises(ValueError, match=message):
            data.evaluation_batches(numbers, **options)
    with pytest.raises(ValueError, match="seed=-1 must lie in"):
        data.batches(numbers, batch_size=4, seed=-1)
    with pytest.raises(ValueError, match="start=-2 must not be negative"):
        data.batches(numbers, batch_size=4, seed=0, start=-2)


def test_reading_ahead_stops_with_the_iterator(numbers: data.Source) -> None:
    before = threading.active_count()
    for _ in range(3):
        take(2, numbers, batch_size=4, seed=0, threads=4)
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before


def test_an_error_in_a_record_reaches_the_caller() -> None:
    class Broken:
        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> data.Record:
            raise OSError("disk on fire")

    with pytest.raises(OSError, match="disk on fire"):
        take(1, Broken(), batch_size=2, seed=0)


# --------------------------------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize(("batch_size", "processes"), [(23, 1), (5, 1), (8, 1), (8, 2), (8, 4), (30, 2), (64, 4)])
def test_evaluation_covers_every_example_once(numbers: data.Source, batch_size: int, processes: int) -> None:
    parts = [
        list(data.evaluation_batches(numbers, batch_size=batch_size, process_index=p, process_count=processes))
        for p in range(processes)
    ]
    assert {len(part) for part in parts} == {-(-23 // batch_size)}
    seen = []
    for same_batch in zip(*parts, strict=True):
        index = np.concatenate([part["index"] for part in same_batch])
        weight = np.concatenate([part["weight"] for part in same_batch])
        assert index.shape == weight.shape == (batch_size,)
        assert weight.dtype == np.float32
        assert set(weight.tolist()) <= {0.0, 1.0}
        seen += index[weight == 1].tolist()
    assert seen == list(range(23))


def test_evaluation_transform_is_the_same_every_time(numbers: data.Source) -> None:
    def noise(**options) -> np.ndarray:
        batches = list(data.evaluation_batches(numbers, transform=noisy, **options))
        weights = np.concatenate([batch["weight"] for batch in batches])
        return np.concatenate([batch["noise"] for batch in batches])[weights == 1]

    np.testing.assert_array_equal(noise(batch_size=4), noise(batch_size=10))
    assert len(np.unique(noise(batch_size=4), axis=0)) == 23


# -------------------------------------------------------------------------------------------------- fingerprint


def test_fingerprint_changes_with_all_that_changes_the_batches() -> None:
    values = np.arange(12.0).reshape(6, 2)
    changed = values.copy()
    changed[3, 1] += 1e-9
    same = {"batch_size": 2, "seed": 0, "transform": None}
    base = data.fingerprint(data.arrays(x=values), **same)
    assert json.loads(json.dumps(base)) == base
    assert data.fingerprint(data.arrays(x=values.copy()), **same) == base
    others = [
        data.fingerprint(data.arrays(x=changed), **same),
        data.fingerprint(data.arrays(x=values.astype(np.float32)), **same),
        data.fingerprint(data.arrays(y=values), **same),
        data.fingerprint(data.arrays(x=values[:5]), **same),
        data.fingerprint(data.arrays(x=values.reshape(6, 1, 2)), **same),
        data.fingerprint(data.arrays(x=values), **{**same, "batch_size": 3}),
        data.fingerprint(data.arrays(x=values), **{**same, "seed": 1}),
        data.fingerprint(data.arrays(x=values), **{**same, "transform": noisy}),
        data.fingerprint(data.arrays(x=values), **{**same, "transform": functools.partial(louder, volume=2)}),
        data.fingerprint(data.arrays(x=values), **{**same, "transform": functools.partial(louder, volume=3)}),
        data.fingerprint(data.arrays(x=values), **{**same, "transform": data.random_affine(1, 0, 0)}),
        data.fingerprint(data.arrays(x=values), **{**same, "transform": data.random_affine(2, 0, 0)}),
    ]
    assert len({json.dumps(entry, sort_keys=True) for entry in [base, *others]}) == 1 + len(others)


def test_fingerprint_names_are_stable_across_processes() -> None:
    class Plain:
        def __call__(self, record: data.Record, generator: np.random.Generator) -> data.Record:
            return record

    names = [
        data.fingerprint(data.arrays(x=np.zeros(2)), batch_size=1, seed=0, transform=transform)["transform"]
        for transform in (None, Plain(), functools.partial(louder, volume=2.0), data.random_affine(1, 10, 0.1))
    ]
    assert names[0] == "none"
    assert not any(" at 0x" in name for name in names)
    assert names[2].endswith("louder(volume=2.0)")
    assert names[3] == "train.data.RandomAffine(max_shift=1.0, max_degrees=10.0, max_scale=0.1, key='image')"


def test_a_source_of_ones_own_is_sampled() -> None:
    class Squares:
        def __init__(self, offset: int) -> None:
            self.offset = offset

        def __len__(self) -> int:
            return 1000

        def __getitem__(self, index: int) -> data.Record:
            return {"x": np.asarray(index**2 + self.offset)}

    same = {"batch_size": 2, "seed": 0, "transform": None}
    assert isinstance(Squares(0), data.Source)
    assert data.fingerprint(Squares(0), **same) == data.fingerprint(Squares(0), **same)
    assert data.fingerprint(Squares(0), **same) != data.fingerprint(Squares(1), **same)


# ------------------------------------------------------------------------------------------------- augmentation


def moved(image: np.ndarray, **motion: float) -> np.ndarray:
    return data._warp(image, **{"angle": 0.0, "scale": 1.0, "down": 0.0, "right": 0.0, **motion})


def test_warp_agrees_with_whole_pixel_shifts_and_quarter_turns() -> None:
    image = np.random.default_rng(0).random((6, 9, 2)).astype(np.float32)
    np.testing.assert_array_equal(moved(image), image)
    down = np.zeros_like(image)
    down[2:, :-1] = image[:-2, 1:]
    np.testing.assert_allclose(moved(image, down=2, right=-1), down, atol=1e-6)
    assert (moved(image, down=50, right=-50) == 0).all()
    square = image[:, :6]
    # Rows run down: a turn from x to y is clockwise on the screen.
    np.testing.assert_allclose(moved(square, angle=np.pi / 2), np.rot90(square, -1), atol=1e-5)
    np.testing.assert_allclose(moved(square, angle=np.pi), square[::-1, ::-1], atol=1e-5)


def test_warp_is_the_bilinear_interpolation_of_scipy() -> None:
    from scipy.ndimage import affine_transform

    image = np.random.default_rng(1).random((8, 8)).astype(np.float32)
    for angle, scale, down, right in [(0.3, 1.0, 0, 0), (-0.2, 1.3, 0.4, -1.7), (1.0, 0.7, 2.2, 0.6)]:
        matrix = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) / scale
        centre = np.full(2, 3.5)
        offset = centre - matrix @ (centre + np.array([down, right]))
        expected = affine_transform(image, matrix, offset, order=1, mode="grid-constant")
        ours = moved(image[..., None], angle=angle, scale=scale, down=down, right=right)[..., 0]
        np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_random_affine_stays_within_its_bounds_and_leaves_the_rest_alone() -> None:
    image = np.zeros((15, 15, 1), np.float32)
    image[6:9, 6:9] = 1
    record = {"image": image, "label": np.int32(3)}
    y, x = np.mgrid[:15, :15] - 7.0
    shifts, masses, results = [], [], []
    for seed in range(200):
        result = data.random_affine(2.0, 30.0, 0.2)(record, np.random.default_rng(seed))
        assert result["label"] is record["label"]
        assert result["image"].dtype == np.float32
        assert result["image"].min() >= 0
        assert result["image"].max() <= 1 + 1e-6
        mass = result["image"][..., 0].sum()
        shifts.append([(result["image"][..., 0] * axis).sum() / mass for axis in (y, x)])
        masses.append(mass / 9)
        results.append(result["image"])
    assert np.abs(shifts).max() <= 2.15
    assert np.abs(shifts).max(axis=0).min() > 1.7
    assert 0.6 < min(masses) < 0.75
    assert 1.3 < max(masses) < 1.6
    assert len(np.unique(np.stack(results).reshape(200, -1), axis=0)) == 200
    again = data.random_affine(2.0, 30.0, 0.2)(record, np.random.default_rng(7))
    np.testing.assert_array_equal(again["image"], results[7])
    np.testing.assert_allclose(data.random_affine(0, 0, 0)(record, np.random.default_rng(0))["image"], image, atol=1e-6)
    assert (record["image"][6:9, 6:9] == 1).all()
    assert record["image"].sum() == 9


def test_wrong_bounds_are_refused() -> None:
    for bounds, message in (((-1, 0, 0), "max_shift=-1"), ((0, float("nan"), 0), "max_degrees=nan")):
        with pytest.raises(ValueError, match=f"{message} must be a finite number of at least 0"):
            data.random_affine(*bounds)


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


def test_importing_data_imports_neither_tensorflow_nor_tfds() -> None:
    script = (
        "import sys, numpy as np, train.data as d\n"
        "source = d.arrays(image=np.ones((9, 8, 8, 1), np.float32))\n"
        "batch = next(d.batches(source, batch_size=4, seed=0, transform=d.random_affine()))\n"
        "print(sorted({'tensorflow', 'tensorflow_datasets', 'torch'} & set(sys.modules)), batch['image'].shape)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[] (4, 8, 8, 1)\n", "")
