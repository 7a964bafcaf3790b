"""Checkpoints come back bitwise, on any mesh, and never silently wrong."""

import json
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from train import checkpoint
from train.checkpoint import Checkpointer, DamageError, Restored, find_step

ROOT = Path(__file__).resolve().parents[2]


def make_mesh(*shape: int) -> Mesh:
    devices = np.array(jax.devices()[: int(np.prod(shape))]).reshape(shape)
    return Mesh(devices, ("fsdp", "tensor"))


def random_bits(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Any bit pattern, NaNs among them: it does not compress, so that its bytes appear as they are in the file."""
    return rng.integers(0, 1 << 32, shape, np.uint32).view(np.float32)


def make_state(seed: int, mesh: Mesh) -> dict:
    """A small state; its kernels are over 1 KiB a shard, so that they are not stored inside the array index."""
    rng = np.random.default_rng(seed)
    split, whole = NamedSharding(mesh, P("fsdp", "tensor")), NamedSharding(mesh, P())
    parameters = {
        "body": {
            "kernel": jax.device_put(random_bits(rng, 64, 128), split),
            "bias": jax.device_put(rng.standard_normal(128).astype(np.float32), whole),
        },
        "head": {"kernel": jax.device_put(random_bits(rng, 128, 64), split)},
    }
    moments = optax.adamw(1e-3).init(parameters)
    return {
        "params": parameters,
        "opt_state": jax.tree.map(lambda x: jax.device_put(x, split if x.ndim == 2 else whole), moments),
        "step": jax.device_put(jnp.int32(seed), whole),
        "rng": jax.device_put(jax.random.key(seed), whole),
    }


def abstract(state: dict) -> dict:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def content(state: dict) -> list[tuple]:
    """Every leaf as (dtype, shape, bytes)."""
    leaves = []
    for leaf in jax.tree.leaves(state):
        dtype = str(leaf.dtype)
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        array = np.asarray(leaf)
        leaves.append((dtype, array.shape, array.tobytes()))
    return leaves


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    return make_mesh(4, 2)


@pytest.fixture(scope="module")
def states(mesh: Mesh) -> dict[int, dict]:
    return {step: make_state(step, mesh) for step in (1, 2)}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, states: dict[int, dict]) -> Path:
    """A directory with the steps 1 and 2, not to be changed."""
    directory = tmp_path_factory.mktemp("saved") / "checkpoints"
    with Checkpointer(directory) as checkpointer:
        for step, state in states.items():
            checkpointer.save(step, state, data={"next_batch": 50 + step}, metrics={"accuracy": step / 4})
    return directory


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    """A copy of that directory, to be damaged."""
    return Path(shutil.copytree(saved, tmp_path / "checkpoints"))


def data_files(step_directory: Path) -> list[Path]:
    """The files that hold arrays, largest first."""
    files = [path for path in (step_directory / "state").rglob("*") if path.is_file() and path.parent.name == "d"]
    return sorted(files, key=lambda path: -path.stat().st_size)


def place_of(leaf: jax.Array, step_directory: Path) -> tuple[Path, int]:
    """Finds the file and offset at which the stored bytes of a leaf's last shard begin."""
    shard = np.asarray(leaf.addressable_shards[-1].data)
    for path in data_files(step_directory):
        offset = path.read_bytes().find(shard.tobytes()[:64])
        if offset >= 0:
            return path, offset
    raise AssertionError("no data file holds the leaf")


def flip(path: Path, offset: int, bit: int = 3) -> None:
    damaged = bytearray(path.read_bytes())
    damaged[offset] ^= 1 << bit
    path.write_bytes(damaged)


def restore(directory: Path, like: dict) -> tuple[Restored | None, list]:
    with Checkpointer(directory) as checkpointer:
        restored = checkpointer.restore(like)
        return restored, checkpointer.skipped


def assert_holds(restored: Restored | None, step: int, states: dict[int, dict]) -> None:
    assert restored is not None
    assert restored.step == step
    assert content(restored.state) == content(states[step])
    assert restored.data == {"next_batch": 50 + step}
    assert restored.metrics == {"accuracy": step / 4}


# ---------------------------------------------------------------------------------------------------- round trip


def test_every_kind_of_leaf_comes_back_bitwise(tmp_path: Path, mesh: Mesh) -> None:
    rng = np.random.default_rng(0)
    whole = NamedSharding(mesh, P())
    values = {
        "float32": np.array([0.0, -0.0, np.nan, np.inf, 1e-45, 3.0], np.float32),
        "bfloat16": jnp.asarray(rng.standard_normal((3, 5)), jnp.bfloat16),
        "float16": rng.standard_normal((2, 3, 4)).astype(np.float16),
        "float8": jnp.asarray(rng.standard_normal(7), jnp.float8_e4m3fn),
        "int8": np.arange(-5, 5, dtype=np.int8),
        "uint32": np.array([[2**32 - 1]], np.uint32),
        "bool": np.array([True, False, True]),
        "complex64": (rng.standard_normal(4) + 1j * rng.standard_normal(4)).astype(np.complex64),
        "scalar": np.float32(2.5),
    }
    state = {name: jax.device_put(value, whole) for name, value in values.items()}
    state["key"] = jax.device_put(jax.random.key(7), whole)
    state["keys"] = jax.device_put(jax.random.split(jax.random.key(8, impl="rbg"), 3), whole)
    state["raw_key"] = jax.device_put(jax.random.PRNGKey(9), whole)
    state["list"] = [state["int8"], (state["bool"], None)]
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(0, state, data={"nested": {"a": [1, 2.5, None, "x"]}, "count": np.int64(3)})
        restored = checkpointer.restore(abstract(state))
    assert restored is not None
    assert content(restored.state) == content(state)
    assert jax.tree.structure(restored.state) == jax.tree.structure(state)
    assert restored.state["keys"].dtype == state["keys"].dtype
    assert jax.tree.map(lambda x: x.sharding.spec, restored.state) == jax.tree.map(lambda x: x.sharding.spec, state)
    assert restored.data == {"nested": {"a": [1, 2.5, None, "x"]}, "count": 3}
    assert restored.metrics == {}


def test_restored_key_draws_the_same_numbers(saved: Path, states: dict[int, dict]) -> None:
    restored, _ = restore(saved, abstract(states[2]))
    assert restored is not None
    np.testing.assert_array_equal(
        jax.random.normal(restored.state["rng"], (5,)), jax.random.normal(states[2]["rng"], (5,))
    )


@pytest.mark.parametrize("shape", [(8, 1), (2, 2), (1, 1)])
def test_another_mesh_gets_the_same_bits(saved: Path, states: dict[int, dict], shape: tuple[int, int]) -> None:
    like = abstract(make_state(0, make_mesh(*shape)))
    restored, skipped = restore(saved, like)
    assert_holds(restored, 2, states)
    assert skipped == []
    assert restored is not None
    for leaf, wanted in zip(jax.tree.leaves(restored.state), jax.tree.leaves(like), strict=True):
        assert leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim)
    kernel = restored.state["params"]["body"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (64 // shape[0], 128 // shape[1])


def test_state_may_be_donated_right_after_save(tmp_path: Path, mesh: Mesh) -> None:
    state = make_state(3, mesh)
    before = content(state)
    update = jax.jit(
        lambda s: jax.tree.map(lambda x: x if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x + 1, s),
        donate_argnums=0,
    )
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(0, state, data={})
        like = abstract(state)
        for _ in range(3):
            state = jax.block_until_ready(update(state))
        restored = checkpointer.restore(like)
    assert restored is not None
    assert content(restored.state) == before
    assert content(state) != before


def test_plain_orbax_reads_the_parameters(saved: Path, states: dict[int, dict]) -> None:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        arguments = ocp.args.PyTreeRestore(
            item={"params": abstract(states[2])["params"]},
            restore_args=ocp.checkpoint_utils.construct_restore_args({"params": abstract(states[2])["params"]}),
            partial_restore=True,
        )
        tree = reader.restore(saved / "2" / "state", args=arguments)
    assert content(tree["params"]) == content(states[2]["params"])


def test_nothing_is_written_before_the_first_save(tmp_path: Path, states: dict[int, dict]) -> None:
    directory = tmp_path / "absent"
    with Checkpointer(directory) as checkpointer:
        assert checkpointer.steps() == []
        assert checkpointer.best_step() is None
        assert checkpointer.restore(abstract(states[1])) is None
        assert checkpointer.skipped == []
    assert not directory.exists()


# -------------------------------------------------------------------------------------------------------- digest


def brute_force_digest(array: np.ndarray) -> str:
    """The docstring's sum, one word at a time in Python integers."""
    mask, total = 2**64 - 1, 0
    size = array.dtype.itemsize
    for place, word in enumerate(np.ascontiguousarray(array).reshape(-1).view(f"u{min(size, 4)}").tolist()):
        weight = (place + 1) * 0x9E3779B97F4A7C15 & mask
        weight ^= weight >> 29
        weight = weight * 0xBF58476D1CE4E5B9 & mask
        weight ^= weight >> 32
        total += (weight | 1) * word
    return f"{total & mask:016x}"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "complex64"])
@pytest.mark.parametrize("shape", [(), (24,), (8, 6), (4, 2, 10), (8, 40000)])
def test_digest_is_the_stated_sum_for_every_sharding(shape: tuple[int, ...], dtype: str) -> None:
    values = np.random.default_rng(0).standard_normal(shape)
    array = np.asarray(jnp.asarray(values if dtype != "int8" else np.rint(9 * values), dtype))
    mesh = make_mesh(4, 2)
    specs = [P(), P("fsdp"), P("tensor", *[None] * (len(shape) - 2), "fsdp"), P(("fsdp", "tensor"))]
    arrays = {}
    for spec in specs:
        fits = len(spec) <= len(shape) and all(
            shape[axis] % int(np.prod([mesh.shape[n] for n in np.atleast_1d(names)])) == 0
            for axis, names in enumerate(spec)
            if names is not None
        )
        if fits:
            arrays[str(spec)] = jax.device_put(array, NamedSharding(mesh, spec))
    assert set(checkpoint._digests(arrays)) == {brute_force_digest(array)}


def test_digest_sees_every_single_bit_and_pairs_of_sign_bits() -> None:
    array = np.random.default_rng(1).standard_normal((3, 4)).astype(np.float32)
    seen = {brute_force_digest(array)}
    words = array.view(np.uint32)
    for place in range(array.size):
        for bit in range(32):
            damaged = words.copy()
            damaged.flat[place] ^= np.uint32(1 << bit)
            seen.update(checkpoint._digests({"x": jnp.asarray(damaged.view(np.float32))}))
    for first in range(array.size):
        for second in range(first):
            damaged = words.copy()
            damaged.flat[[first, second]] ^= np.uint32(1 << 31)
            seen.update(checkpoint._digests({"x": jnp.asarray(damaged.view(np.float32))}))
    assert len(seen) == 1 + 12 * 32 + 66


# -------------------------------------------------------------------------------------------------- what is kept


def run_with_metrics(directory: Path, values: list[float | None], **options) -> list[int]:
    state = {"x": jnp.arange(4.0)}
    with Checkpointer(directory, **options) as checkpointer:
        for step, value in enumerate(values):
            metrics = None if value is None else {"accuracy": value}
            assert checkpointer.save(step, state, data={}, metrics=metrics)
        checkpointer.wait()
        return checkpointer.steps()


def test_newest_and_best_are_both_kept(tmp_path: Path) -> None:
    values = [0.5, 0.9, 0.8, 0.7, 0.6, 0.4]
    assert run_with_metrics(tmp_path / "max", values, metric="accuracy") == [5, 4, 1]
    assert run_with_metrics(tmp_path / "two", values, metric="accuracy", keep_last=1, keep_best=2) == [5, 2, 1]
    assert run_with_metrics(tmp_path / "min", values[::-1], metric="accuracy", mode="min") == [5, 4, 0]
    assert run_with_metrics(tmp_path / "none", values) == [5, 4]
    assert sorted(os.listdir(tmp_path / "max")) == ["1", "4", "5"]


def test_multiples_stay_for_good_beside_them(tmp_path: Path) -> None:
    values = [0.5, 0.9, 0.8, 0.7, 0.6, 0.4, 0.3, 0.2]
    kept = run_with_metrics(tmp_path / "both", values, metric="accuracy", keep_every=3)
    assert kept == [7, 6, 3, 1, 0]
    assert run_with_metrics(tmp_path / "alone", values, keep_last=1, keep_every=4) == [7, 4, 0]


def test_steps_without_a_finite_metric_are_never_the_best(tmp_path: Path) -> None:
    values = [float("nan"), None, 0.1, float("inf"), None, None]
    assert run_with_metrics(tmp_path, values, metric="accuracy") == [5, 4, 2]


def test_best_step_survives_a_restart(tmp_path: Path) -> None:
    run_with_metrics(tmp_path, [0.1, 0.9, 0.3], metric="accuracy")
    state = {"x": jnp.arange(4.0)}
    with Checkpointer(tmp_path, metric="accuracy") as checkpointer:
        assert checkpointer.best_step() == 1
        for step in (3, 4, 5):
            checkpointer.save(step, state, data={}, metrics={"accuracy": 0.9 if step == 4 else 0.2})
        checkpointer.wait()
        # The newer of two equally good steps is the best.
        assert checkpointer.best_step() == 4
        assert checkpointer.steps() == [5, 4]


def test_a_step_can_be_restored_by_number(saved: Path, states: dict[int, dict]) -> None:
    with Checkpointer(saved) as checkpointer:
        assert_holds(checkpointer.restore(abstract(states[1]), step=1), 1, states)
        with pytest.raises(ValueError, match=r"step=7 must be one of \[2, 1\]"):
            checkpointer.restore(abstract(states[1]), step=7)


# ------------------------------------------------------------------------------------------------------- misuse


def test_saving_a_step_twice_is_harmless_and_an_older_one_is_refused(tmp_path: Path) -> None:
    state = {"x": jnp.arange(4.0)}
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.save(5, state, data={}) is True
        assert checkpointer.save(5, state, data={}) is False
        with pytest.raises(ValueError, match="step=4 must be newer than step 5 saved in .*; restore first"):
            checkpointer.save(4, state, data={})
        with pytest.raises(ValueError, match="step=-1 must not be negative"):
            checkpointer.save(-1, state, data={})
    with Checkpointer(tmp_path) as checkpointer:
        with pytest.raises(ValueError, match="step=5 must be newer than step 5"):
            checkpointer.save(5, state, data={})
        checkpointer.restore(abstract(state))
        assert checkpointer.save(5, state, data={}) is False
        assert checkpointer.save(6, state, data={}) is True


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep_last": 0}, "keep_last=0 must be at least 1"),
        ({"keep_best": -1}, "keep_best=-1 must not be negative"),
        ({"keep_every": 0}, "keep_every=0 must be at least 1"),
        ({"mode": "best"}, "mode='best' must be 'max' or 'min'"),
    ],
)
def test_wrong_options_are_refused(tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Checkpointer(tmp_path, **options)


def test_what_cannot_be_stored_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    x = jnp.arange(4.0)
    with Checkpointer(tmp_path / "c") as checkpointer:
        with pytest.raises(ValueError, match="data must hold only what JSON can, got .*object"):
            checkpointer.save(0, {"x": x}, data={"position": object()})
        with pytest.raises(ValueError, match="state leaf 'x/count' must be a jax.Array, got int; create"):
            checkpointer.save(0, {"x": {"count": 3}}, data={})
        with pytest.raises(ValueError, match="distinct names, got 'a.b' twice"):
            checkpointer.save(0, {"a": {"b": x}, "a.b": x}, data={})
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s["params"]["head"].update(kernel=jax.ShapeDtypeStruct((128, 10), jnp.float32)),
         r"leaf 'params/head/kernel' with shape \[128, 10\], got \[128, 64\]; use the model"),
        (lambda s: s["params"]["head"].update(kernel=jax.ShapeDtypeStruct((128, 64), jnp.bfloat16)),
         "leaf 'params/head/kernel' with dtype bfloat16, got float32"),
        (lambda s: s["params"].update(extra=jax.ShapeDtypeStruct((1,), jnp.float32)),
         "must hold leaf 'params/extra', but has no such leaf"),
        (lambda s: s["params"].pop("head"), "must not hold leaf 'params/head/kernel', which the state lacks"),
        (lambda s: s.update(rng=jax.ShapeDtypeStruct((), jax.random.key(0, impl="rbg").dtype)),
         r"leaf 'rng' with dtype key<rbg>, got key<fry>"),
    ],
)  # fmt: skip
def test_a_changed_model_is_an_error_and_not_damage(saved: Path, states: dict[int, dict], change, message: str) -> None:
    like = abstract(states[2])
    change(like)
    with Checkpointer(saved) as checkpointer:
        with pytest.raises(ValueError, match=message):
            checkpointer.restore(like)
        assert checkpointer.skipped == []


def test_another_precision_is_taken_when_it_is_asked_for(saved: Path, states: dict[int, dict]) -> None:
    like = abstract(states[2])
    kernel = like["params"]["head"]["kernel"]
    half = jax.ShapeDtypeStruct(kernel.shape, jnp.bfloat16, sharding=kernel.sharding)
    like["params"]["head"].update(kernel=half)
    with Checkpointer(saved) as checkpointer:
        restored = checkpointer.restore(like, cast=True)
        assert restored is not None
        found = restored.state["params"]["head"]["kernel"]
        assert found.dtype == jnp.bfloat16
        assert found.sharding == kernel.sharding
        wanted = states[2]["params"]["head"]["kernel"].astype(jnp.bfloat16)
        np.testing.assert_array_equal(found.astype(jnp.float32), wanted.astype(jnp.float32))
        whole_number = jax.ShapeDtypeStruct(kernel.shape, jnp.int32, sharding=kernel.sharding)
        like["params"]["head"].update(kernel=whole_number)
        with pytest.raises(ValueError, match="with dtype int32, got float32"):
            checkpointer.restore(like, cast=True)


def test_some_leaves_of_a_step_can_be_read_alone(saved: Path, states: dict[int, dict]) -> None:
    newest, older = find_step(saved)
    assert (newest.number, older.number) == (2, 1)
    wanted = states[2]["params"]["head"]["kernel"]
    arrays = newest.read({"params/head/kernel": wanted})
    assert list(arrays) == ["params/head/kernel"]
    np.testing.assert_array_equal(arrays["params/head/kernel"], wanted)
    (only,) = find_step(saved / "1")
    assert only.number == 1


def test_steps_are_read_from_a_place_relative_to_the_working_directory(
    saved: Path, states: dict[int, dict], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(saved.parent)
    kernel = states[2]["params"]["head"]["kernel"]
    (step,) = find_step(saved.name, 2)
    np.testing.assert_array_equal(step.read({"params/head/kernel": kernel})["params/head/kernel"], kernel)


def test_a_read_leaf_that_is_damaged_is_named_and_others_are_not(copy: Path, states: dict[int, dict]) -> None:
    kernel = states[2]["params"]["body"]["kernel"]
    flip(*place_of(kernel, copy / "2"))
    step = find_step(copy, 2)[0]
    with pytest.raises(DamageError, match="leaf 'params/body/kernel'"):
        step.read({"params/body/kernel": kernel})
    assert step.read({"params/head/kernel": states[2]["params"]["head"]["kernel"]})


# ------------------------------------------------------------------------------------------------------- damage


def remove_tree(step: Path) -> None:
    shutil.rmtree(step / "state")


def empty_directory(step: Path) -> None:
    shutil.rmtree(step)
    step.mkdir()


def half_written(step: Path) -> None:
    (step / "manifest" / "manifest.json").unlink()
    step.rename(step.with_name("2.orbax-checkpoint-tmp"))


def not_a_directory(step: Path) -> None:
    shutil.rmtree(step)
    step.write_text("")


def change_data_position(step: Path) -> None:
    manifest = step / "manifest" / "manifest.json"
    text = manifest.read_text()
    assert '"next_batch": 52' in text
    manifest.write_text(text.replace('"next_batch": 52', '"next_batch": 12'))


def manifest_of_another_step(step: Path) -> None:
    shutil.copy(step.with_name("1") / "manifest" / "manifest.json", step / "manifest" / "manifest.json")


def empty_largest(step: Path) -> None:
    for path in data_files(step):
        path.write_bytes(b"")


def truncate_largest(step: Path) -> None:
    for path in data_files(step):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def zero_block(step: Path) -> None:
    for path in data_files(step)[:2]:
        damaged = bytearray(path.read_bytes())
        damaged[2000:6000] = bytes(len(damaged[2000:6000]))
        path.write_bytes(damaged)


def remove_largest(step: Path) -> None:
    for path in data_files(step):
        path.unlink()


DAMAGE = {
    "truncated": (truncate_largest, "cannot be read"),
    "emptied": (empty_largest, "cannot be read"),
    "zeroed": (zero_block, "leaf 'params/.*/kernel' (cannot be read|does not match its digest)"),
    "removed": (remove_largest, "cannot be read"),
    "array index removed": (lambda step: (step / "state" / "manifest.ocdbt").unlink(), "the state cannot be read"),
    "metadata cut": (lambda step: (step / "state" / "_METADATA").write_text('{"tree'), "JSONDecodeError"),
    "state removed": (remove_tree, "it has no state"),
    "manifest removed": (lambda s: (s / "manifest" / "manifest.json").unlink(), "it has no manifest/manifest.json"),
    "manifest cut": (lambda s: os.truncate(s / "manifest" / "manifest.json", 300), "manifest cannot be read"),
    "manifest not text": (lambda s: (s / "manifest" / "manifest.json").write_bytes(b"\xff\x00"), "cannot be read"),
    "data position changed": (change_data_position, "manifest does not match its checksum"),
    "manifest of another step": (manifest_of_another_step, "its manifest belongs to step 1"),
    "empty directory": (empty_directory, "it is empty"),
    "half-written": (half_written, "half-written"),
    "not a directory": (not_a_directory, "not a directory"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named_and_skipped(
    kind: str, copy: Path, states: dict[int, dict], caplog: pytest.LogCaptureFixture
) -> None:
    damage, reason = DAMAGE[kind]
    damage(copy / "2")
    with caplog.at_level(logging.WARNING):
        restored, skipped = restore(copy, abstract(states[2]))
    assert_holds(restored, 1, states)
    assert [entry.step for entry in skipped] == [2]
    assert re.search(reason, skipped[0].reason), skipped[0].reason
    warnings = [record.getMessage() for record in caplog.records if record.name == "train.checkpoint"]
    assert warnings == [f"skipped checkpoint {skipped[0].path}: {skipped[0].reason}"]


@pytest.mark.parametrize("leaf", ["body", "head"])
def test_a_flipped_bit_is_caught_and_the_leaf_named(copy: Path, states: dict[int, dict], leaf: str) -> None:
    path, offset = place_of(states[2]["params"][leaf]["kernel"], copy / "2")
    flip(path, offset + 16)
    restored, skipped = restore(copy, abstract(states[2]))
    assert_holds(restored, 1, states)
    assert [entry.reason for entry in skipped] == [f"leaf 'params/{leaf}/kernel' does not match its digest"]


def test_without_the_digest_the_flipped_bit_passes_silently(
    copy: Path, states: dict[int, dict], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, offset = place_of(states[2]["params"]["body"]["kernel"], copy / "2")
    flip(path, offset + 16)
    manifest = json.loads((copy / "2" / "manifest" / "manifest.json").read_text())
    trusted = {name: leaf["digest"] for name, leaf in manifest["content"]["leaves"].items()}
    monkeypatch.setattr(checkpoint, "_digests", lambda arrays: [trusted[name] for name in arrays])
    restored, skipped = restore(copy, abstract(states[2]))
    assert restored is not None
    assert restored.step == 2
    assert skipped == []
    assert content(restored.state) != content(states[2])


def test_no_damage_to_any_file_gives_a_wrong_state(copy: Path, states: dict[int, dict]) -> None:
    rng = np.random.default_rng(0)
    files = sorted(path for path in (copy / "2").rglob("*") if path.is_file() and path.stat().st_size)
    assert len(files) >= 8

    def truncate(path: Path) -> None:
        path.write_bytes(path.read_bytes()[: int(rng.integers(path.stat().st_size))])

    def flip_one(path: Path) -> None:
        flip(path, int(rng.integers(path.stat().st_size)), int(rng.integers(8)))

    caught = {}
    for path in files:
        intact = path.read_bytes()
        for damage in (flip_one, truncate, Path.unlink):
            damage(path)
            restored, skipped = restore(copy, abstract(states[2]))
            # Either the damage is named and the step before is used, or it lies where it changes nothing.
            assert_holds(restored, 1 if skipped else 2, states)
            assert all(entry.reason for entry in skipped)
            caught[damage.__name__] = caught.get(damage.__name__, 0) + bool(skipped)
            path.write_bytes(intact)
    assert min(caught.values()) >= 3


def test_everything_damaged_gives_none_and_says_so(
    copy: Path, states: dict[int, dict], caplog: pytest.LogCaptureFixture
) -> None:
    for step in ("1", "2"):
        shutil.rmtree(copy / step / "state")
    with Checkpointer(copy) as checkpointer, caplog.at_level(logging.WARNING):
        assert checkpointer.restore(abstract(states[2])) is None
        assert [entry.step for entry in checkpointer.skipped] == [2, 1]
        assert "no intact checkpoint" in caplog.text
        with pytest.raises(ValueError, match="step=1 must be intact, but it has no state"):
            checkpointer.restore(abstract(states[1]), step=1)


def test_training_goes_on_over_a_damaged_step_and_moves_it_aside(
    copy: Path, states: dict[int, dict], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, offset = place_of(states[2]["params"]["head"]["kernel"], copy / "2")
    flip(path, offset)
    shutil.copytree(copy / "2", copy / "4.orbax-checkpoint-tmp")
    (copy / "3").mkdir()
    with Checkpointer(copy, keep_last=3) as checkpointer:
        restored = checkpointer.restore(abstract(states[2]))
        assert [(entry.step, Path(entry.path).name) for entry in checkpointer.skipped] == [
            (4, "4.orbax-checkpoint-tmp"),
            (3, "3"),
            (2, "2"),
        ]
        assert_holds(restored, 1, states)
        assert sorted(os.listdir(copy)) == ["1", "2", "3", "4.orbax-checkpoint-tmp"]
        assert checkpointer.save(2, states[2], data={"next_batch": 52}, metrics={"accuracy": 0.5})
        assert_holds(checkpointer.restore(abstract(states[2])), 2, states)
        assert checkpointer.skipped == []
        assert sorted(os.listdir(copy)) == ["1", "2", "damaged"]
        # A later save that fails is named, and costs none of the steps before it.
        assert checkpointer.save(3, states[1], data={})
        with monkeypatch.context() as patch:
            finish = checkpointer._orbax.wait_until_finished

            def fail() -> None:
                finish()
                raise OSError("quota exceeded")

            patch.setattr(checkpointer._orbax, "wait_until_finished", fail)
            with pytest.raises(RuntimeError, match=r"saving step 3 in .* failed \(OSError: quota exceeded\)"):
                checkpointer.wait()
        assert checkpointer.save(4, states[1], data={})
        checkpointer.wait()
        assert checkpointer.steps() == [4, 3, 2]
    assert sorted(os.listdir(copy)) == ["2", "3", "4", "damaged"]
    assert sorted(os.listdir(copy / "damaged")) == ["2", "3"]


# ----------------------------------------------------------------------------------------- kill, full disk, quiet

PREAMBLE = """
import os, signal, sys
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np
from train.checkpoint import Checkpointer
directory = Path(sys.argv[1])
def state(step):
    values = np.random.default_rng(step).standard_normal(1 << 20)
    return {"x": jnp.asarray(values, jnp.float32), "step": jnp.int32(step)}
like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state(0))
def same(restored):
    pairs = zip(jax.tree.leaves(restored.state), jax.tree.leaves(state(restored.step)))
    return all(np.array_equal(one, other) for one, other in pairs)
def save_first(name):
    checkpointer = Checkpointer(directory / name)
    checkpointer.save(1, state(1), data={"next_batch": 1})
    checkpointer.wait()
    return checkpointer, directory / name
"""

KILL_AT_COMMIT = """
checkpointer, _ = save_first("commit")
rename = os.rename
def dying(source, target, *rest, **keywords):
    if Path(target).name == "2":
        os.kill(os.getpid(), signal.SIGKILL)
    return rename(source, target, *rest, **keywords)
os.rename = dying
checkpointer.save(2, state(2), data={"next_batch": 2})
checkpointer.wait()
"""

KILL_AFTER_SAVE = """
checkpointer, _ = save_first("after")
checkpointer.save(2, state(2), data={"next_batch": 2})
os.kill(os.getpid(), signal.SIGKILL)
"""

FULL_DISK = """
import resource
_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
checkpointer, directory_ = save_first("disk")
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
for attempt in ("save", "wait"):
    try:
        checkpointer.save(2 if attempt == "save" else 3, state(2), data={})
        checkpointer.wait() if attempt == "wait" else checkpointer.save(3, state(3), data={})
        print("no error")
    except RuntimeError as error:
        print(attempt, str(error).replace(str(directory_), "DIR"))
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
print(checkpointer.steps())
restored = checkpointer.restore(like)
print(restored.step, restored.data, same(restored), [entry.step for entry in checkpointer.skipped])
checkpointer.save(3, state(3), data={"next_batch": 3})
checkpointer.wait()
print(checkpointer.steps(), same(checkpointer.restore(like)), sorted(os.listdir(directory_)))
sys.stdout.flush()
checkpointer.close()
"""

QUIET = """
import logging, time
logging.getLogger("train.checkpoint").setLevel(logging.ERROR)
checkpointer = Checkpointer(directory / "quiet")
for step in (1, 2):
    checkpointer.save(step, {"a": state(step), "b": {"c": jnp.arange(4096.0)}}, data={}, metrics={"loss": 1.0})
checkpointer.wait()
(directory / "quiet" / "2" / "state" / "manifest.ocdbt").unlink()
mesh = jax.make_mesh((8,), ("data",))
shard = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
spread = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=shard if x.ndim else whole)
wanted = jax.tree.map(spread, {"a": like, "b": {"c": jax.ShapeDtypeStruct((4096,), jnp.float32)}})
for _ in range(5):
    with Checkpointer(directory / "quiet") as other:
        assert other.restore(wanted).step == 1 and [entry.step for entry in other.skipped] == [2]
checkpointer.close()
time.sleep(0.2)
print("done", flush=True)
"""


def start(script: str, directory: Path) -> subprocess.Popen:
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    }
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(PREAMBLE + script), str(directory)],
        env=environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str, str, Path]]:
    """Runs two processes side by side, each with two tasks, since most of their time is imports."""
    started = {}
    for name, script in {"quiet": QUIET + KILL_AT_COMMIT, "disk": FULL_DISK + KILL_AFTER_SAVE}.items():
        directory = tmp_path_factory.mktemp(name)
        started[name] = (start(script, directory), directory)
    results = {}
    for name, (process, directory) in started.items():
        output, errors = process.communicate(timeout=120)
        results[name] = (process.returncode, output, errors, directory)
    return results


def killed_state(step: int) -> dict:
    values = np.random.default_rng(step).standard_normal(1 << 20)
    return {"x": jnp.asarray(values, jnp.float32), "step": jnp.int32(step)}


def test_kill_at_the_moment_of_commit_leaves_the_previous_step(runs) -> None:
    code, _, errors, directory = runs["quiet"]
    assert code == -signal.SIGKILL, errors
    directory = directory / "commit"
    assert sorted(os.listdir(directory)) == ["1", "2.orbax-checkpoint-tmp"]
    with Checkpointer(directory) as checkpointer:
        restored = checkpointer.restore(abstract(killed_state(1)))
        assert restored is not None
        assert restored.step == 1
        assert restored.data == {"next_batch": 1}
        assert content(restored.state) == content(killed_state(1))
        assert [(entry.step, entry.reason.split(":")[0]) for entry in checkpointer.skipped] == [(2, "half-written")]
        assert checkpointer.save(2, killed_state(2), data={})
    assert sorted(os.listdir(directory)) == ["1", "2"]


def test_kill_right_after_save_leaves_a_whole_step(runs) -> None:
    code, _, errors, directory = runs["disk"]
    assert code == -signal.SIGKILL, errors
    restored, skipped = restore(directory / "after", abstract(killed_state(1)))
    assert restored is not None
    assert restored.step + len(skipped) in (1, 2)  # step 2 was committed, half-written, or not begun
    assert restored.data == {"next_batch": restored.step}
    assert content(restored.state) == content(killed_state(restored.step))


def test_a_full_disk_names_the_step_and_loses_nothing(runs) -> None:
    _, output, errors, _ = runs["disk"]
    assert len(output.splitlines()) == 5, errors
    first, second, listed, restored, after = output.strip().splitlines()
    assert first.startswith("save saving step 2 in DIR failed (")
    assert "earlier steps are untouched" in first
    assert second.startswith("wait saving step 3 in DIR failed (")
    assert listed == "[1]"
    assert restored.startswith("1 {'next_batch': 1} True [")
    assert after == "[3, 1] True ['1', '3']"


def test_nothing_is_printed_even_when_a_damaged_step_is_read(runs) -> None:
    _, output, errors, _ = runs["quiet"]
    assert (output, errors) == ("done\n", "")


# ---------------------------------------------------------------------------------------------- several processes

TWO_PROCESSES = """
import sys
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np
rank, port, directory = int(sys.argv[2]), sys.argv[3], Path(sys.argv[1])
jax.distributed.initialize("127.0.0.1:" + port, num_processes=2, process_id=rank)
from jax.experimental import multihost_utils
from train.checkpoint import Checkpointer
mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
def state(step):
    make = lambda: {"x": jax.random.bits(jax.random.key(step), (64, 256)), "step": jnp.int32(step)}
    return jax.jit(make, out_shardings={"x": split, "step": whole})()
like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state(0))
def same(restored):
    pairs = zip(jax.tree.leaves(restored.state), jax.tree.leaves(state(restored.step)))
    return all(np.array_equal(a.addressable_data(0), b.addressable_data(0)) for a, b in pairs)
def damage(step, change):
    if rank == 0:
        files = (directory / str(step) / "state" / "ocdbt.process_1" / "d").iterdir()
        path = max(files, key=lambda file: file.stat().st_size)
        path.write_bytes(change(path.read_bytes()))
    multihost_utils.sync_global_devices("damage")
with Checkpointer(directory, keep_last=3) as checkpointer:
    for step in (1, 2, 3):
        checkpointer.save(step, state(step), data={})
    checkpointer.wait()
    damage(3, lambda content: content[:100])  # only process 1 fails to read it
    damage(2, lambda content: content[:5000] + bytes([content[5000] ^ 1]) + content[5001:])
    restored = checkpointer.restore(like)
    print(restored.step, same(restored))
    for entry in checkpointer.skipped:
        print(entry.step, entry.reason)
    checkpointer.save(4, state(4), data={})
    restored = checkpointer.restore(like)
    print(restored.step, same(restored), checkpointer.steps())
"""


@pytest.mark.slow
def test_two_processes_walk_back_together_when_one_of_them_cannot_read(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {**os.environ, "XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_PROCESSES, str(tmp_path), str(rank), port],
            env=environment,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    results = [process.communicate(timeout=180) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], results
    for rank, (output, _) in enumerate(results):
        first, newest, older, last = [line for line in output.splitlines() if not line.startswith("[Gloo]")]
        assert first == "1 True"
        assert newest == "3 process 1 cannot go on" if rank == 0 else newest.startswith("3 leaf 'x' cannot be read")
        assert older == "2 leaf 'x' does not match its digest"
        assert last == "4 True [4, 1]"
    assert sorted(os.listdir(tmp_path)) == ["1", "4", "damaged"]
