"""Exports come back bit for bit, say what they are, and name what is damaged."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open

from tests.train import shared_cache
from tests.train.config_test import TINY
from tools.export import main
from train import export, loop
from train.checkpoint import Checkpointer
from train.config import MeshShape, load
from train.export import load_exported, write_safetensors


def arrays():
    rng = np.random.default_rng(0)
    kinds = ["float32", "float16", "float64", "int32", "uint8", "bool"]
    found = {f"layer.{kind}": rng.normal(size=(3, 5)).astype(kind) for kind in kinds}
    found["layer.bfloat16"] = rng.normal(size=(4, 4)).astype(ml_dtypes.bfloat16)
    found["layer.transposed"] = rng.normal(size=(3, 5)).astype(np.float32).T
    found["layer.strided"] = rng.normal(size=(6, 6)).astype(np.float32)[::2, ::3]
    found["scalar"] = np.float32(2.5).reshape(())
    found["empty"] = np.zeros((0, 3), np.float32)
    return found


@pytest.mark.parametrize(("shard_size", "files"), [(1 << 30, 1), (200, 4)])
def test_every_dtype_and_layout_comes_back_bit_for_bit(tmp_path, shard_size, files):
    tensors = arrays()
    paths = write_safetensors(tmp_path, tensors, shard_size=shard_size)
    assert (len(paths) == 1) == (files == 1)
    found = export.read(tmp_path)
    assert found.keys() == {name.replace(".", "/") for name in tensors}
    for name, array in tensors.items():
        other = found[name.replace(".", "/")]
        assert other.dtype == array.dtype
        assert other.shape == array.shape
        assert other.tobytes() == np.ascontiguousarray(array).tobytes()
    if files > 1:
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert index["weight_map"].keys() == tensors.keys()
        assert {path.name for path in paths} == set(index["weight_map"].values())
        assert paths[0].name == f"model-00001-of-{len(paths):05}.safetensors"
    assert export.shapes(tmp_path)["layer/transposed"] == (5, 3)


def test_a_flipped_bit_is_named_where_the_format_itself_sees_nothing(tmp_path):
    (path,) = write_safetensors(tmp_path, {"a.kernel": np.ones((64, 64), np.float32), "b": np.ones(3, np.float32)})
    content = bytearray(path.read_bytes())
    content[-5000] ^= 1
    path.write_bytes(bytes(content))
    with safe_open(str(path), "numpy") as file:
        assert np.any(file.get_tensor("a.kernel") != 1)
    with pytest.raises(ValueError, match="tensor 'a.kernel' does not match its SHA-256; export the run again"):
        load_exported(tmp_path)
    assert export.read(tmp_path, ["b"])["b"].shape == (3,)
    path.write_bytes(bytes(content[:-9]))
    with pytest.raises(ValueError, match="is not a whole safetensors file"):
        load_exported(tmp_path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"must hold model.safetensors; export a run there"):
        load_exported(tmp_path)
    paths = write_safetensors(tmp_path, arrays(), shard_size=200)
    paths[1].unlink()
    with pytest.raises(ValueError, match=re.escape(f"must hold {paths[1].name}")):
        load_exported(tmp_path)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    config = dataclasses.replace(load(TINY), steps=6, ema_decay=0.5, mesh=MeshShape(fsdp=2, tensor=2))
    with shared_cache.used():
        return config, workdir, loop.train(config, workdir, silent=True)


def test_an_exported_run_gives_the_logits_of_the_run(run, tmp_path, capsys):
    config, workdir, result = run
    assert main([str(workdir), str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "out")
    weights = load_exported(tmp_path / "out")
    jax.tree.map(np.testing.assert_array_equal, weights.params, result.state.ema)
    jax.tree.map(np.testing.assert_array_equal, weights.collections, dict(result.state.collections))
    tokens = jnp.asarray(config.test_data[0]["tokens"])[None]
    variables = {"params": result.state.ema, **result.state.collections}
    wanted = config.model.apply(jax.device_get(variables), tokens)
    found = config.model.apply({"params": weights.params, **weights.collections}, tokens)
    np.testing.assert_array_equal(found, wanted)
    last = export.export_run(workdir, tmp_path / "last", ema=False)
    jax.tree.map(np.testing.assert_array_equal, load_exported(last).params, result.state.params)


def test_the_card_and_the_config_say_what_it_is(run, tmp_path):
    _, workdir, result = run
    folder = export.export_run(workdir, tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    assert config["library_name"] == "jaxlayers"
    assert config["step"] == 6
    assert config["averaged"] is True
    assert config["config"]["model.features"] == "16"
    assert config["versions"]["jax"] == jax.__version__
    assert config["metrics"]["accuracy"] == result.metrics["accuracy"]
    assert config["parameters"] == sum(leaf.size for leaf in jax.tree.leaves(result.state.params))
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: jaxlayers\n")
    assert f"| accuracy | {result.metrics['accuracy']:.4f} |" in card
    assert "averaged over the steps" in card
    assert "features=16" in card


def test_the_cards_snippet_runs(run, tmp_path):
    config, workdir, _ = run
    folder = export.export_run(workdir, tmp_path / "out")
    snippet = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[1]
    tokens = jnp.asarray(config.test_data[0]["tokens"])[None]
    names = {"model": config.model, "inputs": tokens}
    exec(snippet.replace("PATH/TO/THIS/FOLDER", str(folder)), names)
    assert names["outputs"].shape == (1, 4)


def test_a_damaged_newest_step_is_not_exported(run, tmp_path):
    _, workdir, _ = run
    with Checkpointer(tmp_path / "checkpoints", keep_last=3) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, {"params": {"kernel": jnp.full((300, 300), float(step))}}, data={})
    data = max((tmp_path / "checkpoints" / "2" / "state").rglob("*"), key=lambda p: p.is_file() and p.stat().st_size)
    data.write_bytes(data.read_bytes()[:-20])
    folder = export.export_run(tmp_path, tmp_path / "out")
    assert json.loads((folder / "config.json").read_text())["step"] == 1
    with pytest.raises(ValueError, match="already holds weights"):
        export.export_run(tmp_path, folder)
    assert main([str(workdir / "none"), str(tmp_path / "x")]) == 2


def test_a_run_with_its_checkpoints_elsewhere_is_found(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.txt").write_text(f"steps = 1\ncheckpoint_dir = '{tmp_path}/far'\nseed = 0\n")
    with Checkpointer(tmp_path / "far") as checkpointer:
        checkpointer.save(1, {"params": {"kernel": jnp.ones((2, 3))}}, data={})
    weights = load_exported(export.export_run(tmp_path / "run", tmp_path / "out"))
    np.testing.assert_array_equal(weights.params["kernel"], np.ones((2, 3)))
