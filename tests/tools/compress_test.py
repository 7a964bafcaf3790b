import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jaxlayers.window.s2lic import S2LIC
from tools import compress
from train import export

TINY = S2LIC(
    features=4,
    latent_features=4,
    num_slices=1,
    depths=(1,),
    num_heads=(1,),
    window_size=4,
    mlp_ratio=1.0,
    enhance_features=0,
    head_dim=4,
    drop_path_rate=0.0,
)


def weights(folder, seed):
    """A file of random weights."""
    shapes = jax.eval_shape(TINY.init, jax.random.key(0), jnp.ones((1, 16, 16, 3)))["params"]
    rng = np.random.default_rng(seed)
    leaves, _ = jax.tree_util.tree_flatten_with_path(shapes)
    names = [".".join(entry.key for entry in path) for path, _ in leaves]
    tensors = {
        name: (0.5 * rng.normal(size=leaf.shape)).astype(np.float32)
        for name, (_, leaf) in zip(names, leaves, strict=True)
    }
    folder.mkdir()
    (path,) = export.write_safetensors(folder, tensors)
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a picture, its compressed file, and two files of weights."""
    folder = tmp_path_factory.mktemp("compress")
    pixels = np.random.default_rng(0).integers(256, size=(21, 30, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(folder / "in.png")
    weights(folder / "one", 0)
    weights(folder / "two", 1)
    return folder


@pytest.fixture(autouse=True)
def tiny_config(monkeypatch):
    monkeypatch.setattr(compress.configs, "load", lambda path: types.SimpleNamespace(model=TINY))


def run(place, action, source, target, model="one"):
    weights_file = next((place / model).glob("*.safetensors"))
    return compress.main([action, str(place / source), str(place / target), "--model", str(weights_file)])


def test_pictures_go_through_a_file_and_errors_leave_what_stood_there(place, capsys):
    assert run(place, "encode", "in.png", "out.s2") == 0
    data = (place / "out.s2").read_bytes()
    assert f"{len(data)} bytes" in capsys.readouterr().out
    assert run(place, "decode", "out.s2", "back.png") == 0
    assert "21 x 30 pixels" in capsys.readouterr().out
    back = (place / "back.png").read_bytes()
    with Image.open(place / "back.png") as picture:
        assert np.asarray(picture).shape == (21, 30, 3)
    # A second time the same bytes.
    assert run(place, "encode", "in.png", "again.s2") == 0
    assert (place / "again.s2").read_bytes() == data

    def fails(match, *arguments, **keywords):
        assert run(place, *arguments, **keywords) == 2
        assert match in capsys.readouterr().err
        assert (place / "back.png").read_bytes() == back
        assert (place / "out.s2").read_bytes() == data

    (place / "damaged.s2").write_bytes(data[:-3] + bytes([data[-3] ^ 1]) + data[-2:])
    fails("damaged", "decode", "damaged.s2", "back.png")
    (place / "short.s2").write_bytes(data[:30])
    fails("damaged", "decode", "short.s2", "back.png")
    fails("start as a file of S2LIC", "decode", "in.png", "back.png")
    fails("pass its parameters", "decode", "out.s2", "back.png", model="two")
    fails("must end as a picture does", "decode", "out.s2", "back.what")
    fails("No such file", "encode", "missing.png", "out.s2")
    fails("must be a picture that Pillow reads", "encode", "damaged.s2", "out.s2")
    # Neither half-written files nor temporary ones.
    names = {path.name for path in place.iterdir()}
    assert names == {"in.png", "out.s2", "again.s2", "back.png", "damaged.s2", "short.s2", "one", "two"}


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    target = tmp_path / "file"
    compress.write_whole(target, b"old")
    plain = tmp_path / "plain"
    plain.write_bytes(b"")
    assert target.stat().st_mode == plain.stat().st_mode
    plain.unlink()

    def broken(source, target):
        raise OSError("disk full")

    monkeypatch.setattr(compress.os, "replace", broken)
    with pytest.raises(OSError, match="disk full"):
        compress.write_whole(target, b"new")
    assert target.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_weights_of_another_model_and_other_configs_are_refused(place, monkeypatch):
    file = next((place / "one").glob("*.safetensors"))
    monkeypatch.setattr(compress.configs, "load", lambda path: types.SimpleNamespace(model=TINY.clone(features=8)))
    with pytest.raises(ValueError, match="require"):
        compress.load_codec(file)
    monkeypatch.setattr(compress.configs, "load", lambda path: types.SimpleNamespace(model=object()))
    with pytest.raises(ValueError, match="must be an S2LIC, not object; pass its --config"):
        compress.load_codec(file)
