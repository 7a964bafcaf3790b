"""Batches are functions of the seed and their number; every example is evaluated once."""

import functools
import itertools
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from train import data
from train.augment import Compose, mixup_cutmix

ROOT = Path(__file__).resolve().parents[2]


def noisy(record: data.Record, generator: np.random.Generator) -> data.Record:
    return {**record, "noise": generator.random(2)}


def louder(record: data.Record, generator: np.random.Generator, volume: float) -> data.Record:
    return {**record, "noise": volume * generator.random(2)}


def scaled(volume: float) -> data.Transform:
    def transform(record: data.Record, generator: np.random.Generator) -> data.Record:
        return {**record, "noise": volume * generator.random(2)}

    return transform


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
        ({"batch_size": 4, "workers": -1}, "workers=-1 must not be negative"),
        ({"batch_size": 4, "on_corrupt": "ignore"}, 'on_corrupt=\'ignore\' must be "stop" or "skip"'),
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

    with pytest.raises(
        RuntimeError, match=r"record \d of .*Broken could not be read .*: OSError: disk on fire"
    ) as raised:
        take(1, Broken(), batch_size=2, seed=0)
    assert isinstance(raised.value.__cause__, OSError)


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


# -------------------------------------------------------------------------------------------------- worker processes


class Marked:
    """Numbers, some of which cannot be read, or kill the process that reads them."""

    name = "marked"

    def __init__(self, broken: tuple[int, ...] = (), deadly: tuple[int, ...] = (), length: int = 23) -> None:
        self.broken, self.deadly, self.length = broken, deadly, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> data.Record:
        if index in self.deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        if index in self.broken:
            raise OSError(f"bad sector {index}")
        return {"index": np.asarray(index), "pid": np.asarray(os.getpid()), "jax": np.asarray("jax" in sys.modules)}


def running(pid: int) -> bool:
    """Returns whether a process exists and is more than an entry that nobody has collected."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")
    return not status.exists() or status.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def without(batches: list[data.Record], *names: str) -> list[data.Record]:
    return [{name: value for name, value in batch.items() if name not in names} for batch in batches]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_any_number_of_workers_gives_the_same_batches(numbers: data.Source, count: int) -> None:
    options = {"batch_size": 8, "seed": 3, "transform": noisy}
    straight = take(9, numbers, **options)
    assert_same(take(9, numbers, workers=count, **options), straight)


def test_workers_go_on_from_any_batch_in_any_number_of_processes(numbers: data.Source) -> None:
    """The state is the number of the batch."""
    count, options = 2, {"batch_size": 8, "seed": 3, "transform": noisy}
    straight = take(9, numbers, **options)
    assert_same(take(5, numbers, workers=count, start=4, **options), straight[4:])
    halves = [take(3, numbers, workers=count, start=2, process_index=p, process_count=2, **options) for p in (0, 1)]
    joined = [{n: np.concatenate([a[n], b[n]]) for n in a} for a, b in zip(*halves, strict=True)]
    assert_same(joined, straight[2:5])
    evaluated = list(data.evaluation_batches(numbers, batch_size=5, transform=noisy))
    assert_same(list(data.evaluation_batches(numbers, batch_size=5, transform=noisy, workers=count)), evaluated)


def test_workers_are_other_processes_without_jax() -> None:
    iterator = data.batches(Marked(), batch_size=4, seed=0, workers=2)
    batches = list(itertools.islice(iterator, 8))
    assert {pid for batch in batches for pid in batch["pid"].tolist()} == set(iterator.pids)
    assert os.getpid() not in iterator.pids
    assert not any(batch["jax"].any() for batch in batches)
    pids = iterator.pids
    iterator.close()
    assert not any(map(running, pids))
    assert next(iterator, None) is None


def test_a_worker_that_is_killed_is_replaced_and_no_batch_changes(
    numbers: data.Source, caplog: pytest.LogCaptureFixture
) -> None:
    options = {"batch_size": 8, "seed": 3, "transform": noisy}
    straight = take(40, numbers, **options)
    iterator = data.batches(numbers, workers=2, **options)
    batches = [next(iterator)]
    with caplog.at_level(logging.WARNING, "train.workers"):
        for number in (1, 0, 1):
            victim = iterator.pids[number]
            os.kill(victim, signal.SIGKILL)
            words = f"worker process {victim} of arrays(index, value) ended by signal SIGKILL"
            # It is noticed when a batch is waited for, that is after those which were ready before.
            while words not in caplog.text:
                batches.append(next(iterator))
            assert victim not in iterator.pids
    batches += [next(iterator) for _ in range(2)]
    iterator.close()
    assert len(caplog.records) == 3
    assert_same(batches, straight[: len(batches)])


def test_a_record_that_kills_its_workers_stops_the_run_in_seconds(caplog: pytest.LogCaptureFixture) -> None:
    start = time.monotonic()
    with (
        caplog.at_level(logging.WARNING, "train.workers"),
        pytest.raises(
            RuntimeError,
            match=r"worker process \d+ of marked ended by signal SIGKILL while it made batch 0, the 3rd to do so",
        ),
    ):
        list(data.evaluation_batches(Marked(deadly=(2,)), batch_size=4, workers=1))
    assert len(caplog.records) == 2
    assert time.monotonic() - start < 60


@pytest.mark.parametrize("count", [0, 2])
def test_a_bad_record_stops_the_run_at_its_own_batch(count: int) -> None:
    iterator = data.evaluation_batches(Marked(broken=(9,)), batch_size=4, workers=count)
    assert [next(iterator)["index"].tolist() for _ in range(2)] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    with pytest.raises(RuntimeError, match="record 9 of marked could not be read .*: OSError: bad sector 9") as raised:
        next(iterator)
    assert isinstance(raised.value.__cause__, OSError)


@pytest.mark.parametrize("count", [0, 2])
def test_a_bad_record_is_replaced_by_the_next_and_counted(count: int, caplog: pytest.LogCaptureFixture) -> None:
    source = Marked(broken=(3, 4, 22))
    options = {"batch_size": 23, "seed": 1, "transform": noisy}
    whole = without(take(2, Marked(), **options), "pid", "jax")
    with caplog.at_level(logging.WARNING, "train.workers"):
        batches = take(2, source, on_corrupt="skip", workers=count, **options)
    for batch, before in zip(batches, whole, strict=True):
        replaced = np.isin(before["index"], [3, 4, 22])
        assert batch[data.CORRUPT].dtype == np.int32
        np.testing.assert_array_equal(batch[data.CORRUPT], replaced)
        expected = np.where(replaced, np.where(before["index"] == 22, 0, 5), before["index"])
        np.testing.assert_array_equal(batch["index"], expected)
        np.testing.assert_array_equal(batch["noise"], before["noise"])  # those of the row, whoever stands in
    assert sorted(record.getMessage().split(" is skipped")[0] for record in caplog.records) == [
        "record 22 of marked", "record 3 of marked", "record 4 of marked"
    ]  # fmt: skip
    assert data.CORRUPT not in take(1, Marked(), **options)[0]


@pytest.mark.parametrize("count", [0, 2])
def test_a_bad_example_has_no_weight_in_evaluation(count: int) -> None:
    source = Marked(broken=(3, 22))
    batches = list(data.evaluation_batches(source, batch_size=8, on_corrupt="skip", workers=count))
    weight, index, corrupt = (np.concatenate([b[n] for b in batches]) for n in ("weight", "index", data.CORRUPT))
    assert index[weight == 1].tolist() == [i for i in range(23) if i not in (3, 22)]
    assert np.flatnonzero(corrupt).tolist() == [3, 22]  # the padding after 22, a copy of it, is not counted again
    assert len(weight) == 24


def test_skipping_gives_up_when_nothing_can_be_read() -> None:
    source = Marked(broken=tuple(range(20)))
    with pytest.raises(RuntimeError, match="nor could the 16 records before it: OSError"):
        list(data.evaluation_batches(source, batch_size=4, on_corrupt="skip"))


@pytest.mark.parametrize("count", [0, 1])
def test_records_of_different_shapes_are_named(count: int) -> None:
    class Growing:
        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: int) -> data.Record:
            return {"image": np.zeros((index + 1, 2))}

    with pytest.raises(
        ValueError, match=r"'image' must have one shape in all records of a batch, got \(1, 2\) and \(2, 2\)"
    ):
        list(data.evaluation_batches(Growing(), batch_size=2, workers=count))


def test_what_does_not_pickle_is_refused() -> None:
    lock = threading.Lock()
    with pytest.raises(ValueError, match="source and transform must be picklable for workers=1, got TypeError"):
        take(1, data.arrays(x=np.zeros(4)), batch_size=2, seed=0, transform=lambda r, g: (lock, r)[1], workers=1)


def test_a_script_without_a_guard_leaves_nothing_behind(tmp_path: Path) -> None:
    """Its own functions reach the workers, it is not run again by them, and all ends without a word."""
    (tmp_path / "script.py").write_text(
        "import itertools, sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "import numpy as np\n"
        "from train import data\n"
        "print('once')\n"
        "def loud(record, generator):\n"
        "    print('a transform may print', file=sys.stdout if generator.random() < 0 else sys.stderr)\n"
        "    print('and to stdout')\n"
        "    return {'x': record['x'] + generator.random()}\n"
        "source = data.arrays(x=np.arange(8.0))\n"
        "def first(workers):\n"
        "    iterator = data.batches(source, batch_size=8, seed=0, transform=loud, workers=workers)\n"
        "    return iterator, next(iterator)['x'].tolist()\n"
        "left_open, batch = first(2)\n"
        "print(left_open.pids)\n"
        "print(batch)\n"
    )
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    once, pids, batch = done.stdout.splitlines()
    assert once == "once"
    for words in ("a transform may print", "and to stdout"):
        assert words in done.stderr
    # Two workers may print at the same time; beyond that nothing is said.
    assert not done.stderr.replace("a transform may print", "").replace("and to stdout", "").strip()
    source = data.arrays(x=np.arange(8.0))
    shifted = lambda record, generator: {"x": record["x"] + (generator.random(), generator.random())[1]}  # noqa: E731
    assert json.loads(batch) == take(1, source, batch_size=8, seed=0, transform=shifted)[0]["x"].tolist()
    deadline = time.monotonic() + 5
    while any(map(running, json.loads(pids))) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(map(running, json.loads(pids)))


def test_workers_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(
        "import sys, time\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "import numpy as np\n"
        "from train import data\n"
        "source = data.arrays(x=np.zeros((16, 1 << 16)))\n"  # batches that do not fit into a pipe
        "batches = data.batches(source, batch_size=8, seed=0, workers=2)\n"
        "next(batches)\n"
        "print(batches.pids, flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "script.py"], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as parent:
        pids = json.loads(parent.stdout.readline())
        assert all(running(pid) for pid in pids)
        parent.kill()
        assert parent.stderr.read() == ""  # until the workers have closed it too
    deadline = time.monotonic() + 10
    while any(map(running, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(map(running, pids))


def test_a_transform_of_a_config_file_reaches_the_workers(tmp_path: Path) -> None:
    from train import config

    (tmp_path / "tiny_here.py").write_text(
        "import dataclasses\n"
        "from tests.train.tiny import config as other\n"
        "def twice(record, generator):\n"
        "    return {**record, 'tokens': 2 * record['tokens']}\n"
        "def config(smoke=False):\n"
        "    return dataclasses.replace(other(smoke), train_transform=twice)\n"
    )
    loaded = config.load(tmp_path / "tiny_here.py")
    options = {"batch_size": 4, "seed": 0, "transform": loaded.train_transform}
    assert_same(take(2, loaded.train_data, workers=1, **options), take(2, loaded.train_data, **options))


def test_signals_to_the_whole_group_leave_the_end_to_the_run(numbers: data.Source) -> None:
    iterator = data.batches(numbers, batch_size=8, seed=3, workers=1)
    next(iterator)
    pids = iterator.pids
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(pids[0], number)
    for _ in range(6):
        next(iterator)
    assert iterator.pids == pids
    iterator.close()


# ------------------------------------------------------------------------------------------------------- prefetching


def test_prefetching_keeps_order_and_puts_every_batch() -> None:
    threads: set[str] = set()

    def put(batch: int) -> int:
        threads.add(threading.current_thread().name)
        return 10 * batch

    assert list(data.prefetch(iter(range(50)), put, depth=3)) == list(range(0, 500, 10))
    assert threads == {"prefetch"}


def test_prefetching_works_ahead_by_its_depth_and_no_more() -> None:
    made: list[int] = []
    iterator = data.prefetch(iter(range(100)), made.append, depth=3)

    def settled() -> int:
        deadline = time.monotonic() + 5
        while len(made) < expected and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(0.05)
        return len(made)

    expected = 3
    assert settled() == 3
    next(iterator)
    expected = 4
    assert settled() == 4
    iterator.close()


@pytest.mark.parametrize("where", ["batches", "put"])
def test_prefetching_raises_at_the_batch_that_failed(where: str) -> None:
    closed = []

    def batches():
        try:
            for number in range(10):
                if where == "batches" and number == 4:
                    raise OSError("batch 4")
                yield number
        finally:
            closed.append(True)

    def put(number: int) -> int:
        if where == "put" and number == 4:
            raise OSError("batch 4")
        return number

    iterator = data.prefetch(batches(), put)
    assert [next(iterator) for _ in range(4)] == [0, 1, 2, 3]
    with pytest.raises(OSError, match="batch 4"):
        next(iterator)
    assert closed == [True]
    assert next(iterator, "over") == "over"


def test_closing_a_prefetch_does_not_wait_for_workers(numbers: data.Source) -> None:
    def stuck(record: data.Record, generator: np.random.Generator) -> data.Record:
        time.sleep(300)
        return record

    iterator = data.prefetch(
        data.batches(numbers, batch_size=4, seed=0, transform=stuck, workers=2), lambda batch: batch
    )
    deadline = time.monotonic() + 60
    while not (pids := iterator._interrupt.__self__.pids) and time.monotonic() < deadline:
        time.sleep(0.01)
    start = time.monotonic()
    iterator.close()
    assert time.monotonic() - start < 8
    assert not iterator._thread.is_alive()
    assert pids
    assert not any(map(running, pids))


def test_closing_a_prefetch_closes_the_batches_and_ends_its_thread(numbers: data.Source) -> None:
    before = threading.active_count()
    source = data.batches(numbers, batch_size=4, seed=0, workers=1)
    iterator = data.prefetch(source, lambda batch: batch["index"])
    next(iterator)
    assert threading.active_count() > before
    iterator.close()
    assert threading.active_count() <= before
    assert source.pids == []
    assert next(iterator, "over") == "over"
    with pytest.raises(ValueError, match="depth=0 must be at least 1"):
        data.prefetch(iter(()), lambda batch: batch, depth=0)


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
        data.fingerprint(data.arrays(x=values), **{**same, "transform": scaled(2)}),
        data.fingerprint(data.arrays(x=values), **{**same, "transform": scaled(3)}),
        data.fingerprint(data.arrays(x=values), **{**same, "transform": Compose((data.random_affine(2, 0, 0),))}),
        data.fingerprint(data.arrays(x=values), **{**same, "transform": Compose((data.random_affine(1, 0, 0),))}),
        data.fingerprint(data.arrays(x=values), **same, on_corrupt="skip"),
        data.fingerprint(data.arrays(x=values), **same, batch_transform=mixup_cutmix(2)),
        data.fingerprint(data.arrays(x=values), **same, batch_transform=mixup_cutmix(2, mixup_alpha=0.3)),
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
    assert names[3] == "train.augment.RandomAffine(max_shift=1.0, max_degrees=10.0, max_scale=0.1, key='image')"


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


def test_importing_data_imports_neither_tensorflow_nor_tfds() -> None:
    script = (
        "import sys, numpy as np, train.data as d\n"
        "source = d.arrays(image=np.ones((9, 8, 8, 1), np.float32))\n"
        "batch = next(d.batches(source, batch_size=4, seed=0, transform=d.random_affine()))\n"
        "print(sorted({'tensorflow', 'tensorflow_datasets', 'torch'} & set(sys.modules)), batch['image'].shape)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[] (4, 8, 8, 1)\n", "")
