"""Checkpoints in an object store: nothing is renamed, and a step counts once its commit file is there."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tests.train import object_store
from train.checkpoint import Checkpointer, find_step

ADDRESS = "gs://bucket/runs/one"
COMMITTED = "commit_success.txt"


def make_state(step: int) -> dict:
    split = NamedSharding(jax.make_mesh((8,), ("data",)), P("data"))
    values = np.random.default_rng(step).standard_normal((64, 64)).astype(np.float32)
    return {"params": {"kernel": jax.device_put(values, split)}, "step": jnp.int32(step)}


def assert_holds(restored, step: int) -> None:
    assert restored is not None
    assert restored.step == step
    jax.tree.map(np.testing.assert_array_equal, restored.state, make_state(step))
    assert restored.data == {"next_batch": step}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the objects of `ADDRESS` lie."""
    object_store.mount(tmp_path, monkeypatch)
    return tmp_path / "bucket" / "runs" / "one"


@pytest.fixture
def saved(folder: Path) -> Path:
    with Checkpointer(ADDRESS, keep_last=2) as checkpointer:
        for step in (1, 2, 3):
            checkpointer.save(step, make_state(step), data={"next_batch": step})
        checkpointer.wait()
        assert checkpointer.steps() == [3, 2]
    return folder


def objects(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if any(entry.is_file() for entry in path.rglob("*")))


def test_steps_are_saved_pruned_and_restored_under_the_address(saved: Path) -> None:
    assert objects(saved) == ["2", "3"]
    with Checkpointer(ADDRESS) as checkpointer:
        assert str(checkpointer.directory) == ADDRESS
        assert_holds(checkpointer.restore(make_state(0)), 3)
        assert_holds(checkpointer.restore(make_state(0), step=2), 2)
    assert [step.number for step in find_step(ADDRESS)] == [3, 2]


def test_a_step_without_its_commit_file_is_passed_over_and_saved_again(saved: Path) -> None:
    (saved / "3" / COMMITTED).unlink()
    with Checkpointer(ADDRESS) as checkpointer:
        assert checkpointer.steps() == [2]
        assert_holds(checkpointer.restore(make_state(0)), 2)
        assert [(entry.step, entry.reason.split(":")[0]) for entry in checkpointer.skipped] == [(3, "half-written")]
        assert checkpointer.save(3, make_state(3), data={"next_batch": 3})
        assert_holds(checkpointer.restore(make_state(0)), 3)
        assert checkpointer.skipped == []
    assert objects(saved) == ["2", "3"]


def test_a_removal_that_is_cut_off_leaves_no_step(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut_off(self: object, path: object) -> None:
        raise KeyboardInterrupt

    with Checkpointer(ADDRESS, keep_last=1) as checkpointer:
        checkpointer.restore(make_state(0))
        checkpointer.save(4, make_state(4), data={"next_batch": 4})
        with monkeypatch.context() as patch:
            patch.setattr(object_store.ObjectStore, "rmtree", cut_off)
            with pytest.raises(KeyboardInterrupt):
                checkpointer.wait()
        assert checkpointer.steps() == [4, 2]
        assert_holds(checkpointer.restore(make_state(0)), 4)


def test_a_damaged_step_is_copied_aside(saved: Path) -> None:
    manifest = saved / "3" / "manifest" / "manifest.json"
    manifest.write_text(manifest.read_text()[:-9])
    with Checkpointer(ADDRESS) as checkpointer:
        assert_holds(checkpointer.restore(make_state(0)), 2)
        assert checkpointer.save(3, make_state(3), data={"next_batch": 3})
        assert_holds(checkpointer.restore(make_state(0)), 3)
    assert objects(saved) == ["2", "3", "damaged"]
    assert (saved / "damaged" / "3" / "manifest" / "manifest.json").exists()


@pytest.mark.parametrize("address", ["s3://bucket/run", "az://bucket/run", "http://host/run"])
def test_a_store_that_cannot_be_written_is_refused_at_once(address: str) -> None:
    with pytest.raises(ValueError, match=f"directory='{address}' must be a folder or gs://bucket/folder; mount"):
        Checkpointer(address)
