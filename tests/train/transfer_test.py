"""Weights from elsewhere: what fits is loaded, what does not is named, and nothing else moves."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.train import shared_cache
from tests.train.config_test import TINY
from train import export, loop
from train.checkpoint import Checkpointer
from train.config import MeshShape, Optim, StartFrom, load
from train.transfer import load_partial


def tree(seed, **shapes):
    rng = np.random.default_rng(seed)
    nested = {}
    for path, shape in shapes.items():
        *parents, last = path.split("__")
        node = nested
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = jnp.asarray(rng.normal(size=shape), jnp.float32)
    return nested


STORED = {"stem__kernel": (3, 4), "block__kernel": (4, 4), "head__kernel": (4, 10), "old__bias": (7,)}
WANTED = {"stem__kernel": (3, 4), "block__kernel": (4, 4), "head__kernel": (4, 2), "new__bias": (5,)}


@pytest.fixture
def saved(tmp_path):
    params = tree(0, **STORED)
    with Checkpointer(tmp_path / "run" / "checkpoints", keep_last=5) as checkpointer:
        for step, factor in ((1, 1.0), (2, 2.0)):
            state = {"params": jax.tree.map(lambda x, f=factor: f * x, params), "opt_state": {"mu": jnp.ones(3)}}
            checkpointer.save(step, state, data={})
        checkpointer.wait()
    return tmp_path / "run", jax.tree.map(lambda x: 2 * x, params)


def test_a_backbone_goes_under_a_new_head(saved):
    run, params = saved
    fresh = tree(1, **WANTED)
    merged, report = load_partial(StartFrom(str(run)), fresh)
    np.testing.assert_array_equal(merged["stem"]["kernel"], params["stem"]["kernel"])
    np.testing.assert_array_equal(merged["block"]["kernel"], params["block"]["kernel"])
    np.testing.assert_array_equal(merged["head"]["kernel"], fresh["head"]["kernel"])
    np.testing.assert_array_equal(merged["new"]["bias"], fresh["new"]["bias"])
    assert set(report.loaded) == {"stem/kernel", "block/kernel"}
    assert report.skipped == {
        "head/kernel": "shape (4, 10) is not the model's (4, 2)",
        "old/bias": "not in the model",
    }
    assert set(report.fresh) == {"head/kernel", "new/bias"}
    text = report.summary()
    assert "2 parameters loaded, 2 skipped, 2 fresh" in text
    assert "loaded: block (1), stem (1)" in text
    assert "skipped head/kernel: shape (4, 10) is not the model's (4, 2)" in text


def test_patterns_choose_and_rename(saved):
    run, params = saved
    fresh = tree(1, body__kernel=(4, 4), stem__kernel=(3, 4))
    renamed = StartFrom(str(run), rename=(("^block/", "body/"),), exclude=("^stem/",))
    merged, report = load_partial(renamed, fresh)
    np.testing.assert_array_equal(merged["body"]["kernel"], params["block"]["kernel"])
    np.testing.assert_array_equal(merged["stem"]["kernel"], fresh["stem"]["kernel"])
    assert report.skipped["stem/kernel"] == "excluded"
    _, report = load_partial(StartFrom(str(run), include=("^stem/",)), tree(1, **WANTED))
    assert report.loaded == ("stem/kernel",)
    assert report.skipped["block/kernel"] == "not included"


@pytest.mark.parametrize("place", ["", "checkpoints", "checkpoints/1"])
def test_run_directory_and_step_are_found(saved, place):
    run, params = saved
    merged, _ = load_partial(StartFrom(str(run / place)), tree(1, **WANTED))
    factor = 0.5 if place.endswith("1") else 1.0
    np.testing.assert_array_equal(merged["stem"]["kernel"], factor * params["stem"]["kernel"])
    merged, _ = load_partial(StartFrom(str(run), step=1), tree(1, **WANTED))
    np.testing.assert_array_equal(merged["stem"]["kernel"], 0.5 * params["stem"]["kernel"])


def test_values_take_the_place_and_the_dtype_of_the_parameter(saved):
    run, _ = saved
    mesh = jax.make_mesh((8,), ("fsdp",))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "fsdp"))
    fresh = {"wide": {"kernel": jax.device_put(jnp.zeros((4, 16), jnp.bfloat16), place)}, **tree(1, **WANTED)}
    with Checkpointer(run / "other" / "checkpoints") as checkpointer:
        checkpointer.save(1, {"params": tree(2, wide__kernel=(4, 16))}, data={})
    merged, _ = load_partial(StartFrom(str(run / "other")), fresh)
    assert merged["wide"]["kernel"].sharding == place
    wanted = tree(2, wide__kernel=(4, 16))["wide"]["kernel"].astype(jnp.bfloat16)
    np.testing.assert_array_equal(merged["wide"]["kernel"], wanted)


def test_the_average_is_preferred_unless_it_is_not_wanted(tmp_path):
    params, ema = tree(0, **STORED), tree(3, **STORED)
    with Checkpointer(tmp_path / "checkpoints") as checkpointer:
        checkpointer.save(1, {"params": params, "ema": ema}, data={})
    for wants, values in ((True, ema), (False, params)):
        merged, report = load_partial(StartFrom(str(tmp_path), ema=wants), tree(1, **WANTED))
        np.testing.assert_array_equal(merged["stem"]["kernel"], values["stem"]["kernel"])
        assert report.source.endswith("(average)") == wants


def flip_largest(folder):
    path = max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def test_a_damaged_step_is_passed_over(saved, caplog):
    run, params = saved
    manifest = run / "checkpoints" / "2" / "manifest" / "manifest.json"
    manifest.write_text(manifest.read_text()[:-9])
    merged, _ = load_partial(StartFrom(str(run)), tree(1, **WANTED))
    np.testing.assert_array_equal(merged["stem"]["kernel"], 0.5 * params["stem"]["kernel"])
    assert "skipped checkpoint" in caplog.text
    with pytest.raises(ValueError, match="must hold an intact checkpoint of step 2"):
        load_partial(StartFrom(str(run), step=2), tree(1, **WANTED))


def test_a_flipped_bit_in_what_is_read_is_never_loaded(tmp_path):
    params = tree(0, stem__kernel=(300, 400))
    with Checkpointer(tmp_path / "checkpoints") as checkpointer:
        checkpointer.save(1, {"params": params}, data={})
    flip_largest(tmp_path / "checkpoints" / "1" / "state")
    with pytest.raises(ValueError, match="must hold intact weights: .*stem/kernel"):
        load_partial(StartFrom(str(tmp_path)), tree(1, stem__kernel=(300, 400)))


@pytest.mark.parametrize(
    ("start", "message"),
    [
        ({"path": "nowhere"}, "start_from.path='nowhere' does not exist"),
        ({"exclude": ("^hed/",)}, r"start_from.exclude: '\^hed/' matches no parameter, for example \['head/kernel'"),
        ({"rename": (("^blok/", "body/"),)}, r"start_from.rename: '\^blok/' matches no parameter"),
        ({"require": ("^head/",)}, r"wants 'head/kernel', which .* \(shape \(4, 10\) is not the model's \(4, 2\)\)"),
        ({"include": ("^new/",)}, "nothing in .* fits the model"),
        ({"step": 7}, r"must hold an intact checkpoint of step 7; it has steps \[1, 2\]"),
        (
            {"rename": (("^block/kernel|^stem/kernel", "block/kernel"),)},
            r"sends both 'block/kernel' and 'stem/kernel' to 'block/kernel'",
        ),
    ],
)
def test_what_cannot_work_is_said(saved, start, message):
    with pytest.raises(ValueError, match=message):
        load_partial(StartFrom(**{"path": str(saved[0]), **start}), tree(1, **WANTED))


def test_a_directory_without_checkpoints_is_refused(tmp_path):
    with pytest.raises(ValueError, match="must hold an intact checkpoint; it has none"):
        load_partial(StartFrom(str(tmp_path)), tree(1, **WANTED))


def test_a_run_starts_from_another_and_resumes_without_it(tmp_path, capsys):
    with shared_cache.used():
        config = dataclasses.replace(load(TINY), steps=3, mesh=MeshShape(), test_data=None, metric=None)
        first = loop.train(config, tmp_path / "first", devices=jax.devices()[:2], silent=True)
        start = StartFrom(str(tmp_path / "first"), exclude=("^head/",), require=("^block_0/",))
        second = dataclasses.replace(
            config, start_from=start, ema_decay=0.5, seed=3, optim=Optim(freeze=("^block_0/", "^embed/"))
        )
        result = loop.train(second, tmp_path / "second", devices=jax.devices()[:2])
        assert "skipped head/kernel: excluded" in capsys.readouterr().out
        for name in ("block_0", "embed"):
            jax.tree.map(np.testing.assert_array_equal, result.state.params[name], first.state.params[name])
            jax.tree.map(np.testing.assert_allclose, result.state.ema[name], first.state.params[name])
        # Once it has a checkpoint of its own, the first run may go.
        (tmp_path / "first").rename(tmp_path / "gone")
        more = loop.train(dataclasses.replace(second, steps=4), tmp_path / "second", devices=jax.devices()[:2])
        assert more.step == 4


def test_an_exported_folder_is_a_start_too(saved, tmp_path):
    run, params = saved
    folder = export.export_run(run, tmp_path / "out")
    for place in (folder, folder / "model.safetensors"):
        merged, report = load_partial(StartFrom(str(place)), tree(1, **WANTED))
        np.testing.assert_array_equal(merged["stem"]["kernel"], params["stem"]["kernel"])
        assert "old/bias" in report.skipped
