"""Programs that `tools.convert --to onnx` writes, run by ONNX Runtime beside the models."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlayers
from jaxlayers.core import dialects
from jaxlayers.files import write_safetensors
from jaxlayers.pretrained import list_dialects, load_pretrained
from tests.round_trip import random_tensors
from tools import convert

FIELDS: dict[str, dict] = {
    "swin_tiny": {"embed_dim": 8, "depths": (2, 1), "num_heads": (2, 2), "window_size": 2, "patch_size": 2},
    "convnext_tiny": {"widths": (8, 12), "depths": (1, 1)},
}
SIZE = 16


@pytest.fixture(scope="module")
def runtime():
    pytest.importorskip("jax2onnx")
    return pytest.importorskip("onnxruntime")


@pytest.fixture
def convert_to_onnx(tmp_path):
    """Return the function that makes a model's weights, has the command write them as ONNX, and returns both."""

    def call(name):
        model = jaxlayers.create_model(name, num_classes=3, **FIELDS[name])
        dialect = next(one for one in list_dialects() if one.module is type(model))
        shapes = dialects.shapes_of(model, (jax.ShapeDtypeStruct((1, SIZE, SIZE, 3), jnp.float32),))
        write_safetensors(tmp_path / "weights.safetensors", random_tensors(dialect.layout(model, shapes)))
        fields = [f"--set={field}={value}" for field, value in {"num_classes": 3, **FIELDS[name]}.items()]
        places = [str(tmp_path / "weights.safetensors"), str(tmp_path / "model.onnx")]
        options = ["--model", name, "--dialect", dialect.name, "--to", "onnx", "--image-size", str(SIZE)]
        code = convert.main(["run", *places, *options, *fields])
        return code, model, load_pretrained(model, tmp_path / "weights.safetensors", dialect=dialect.name)

    return call


@pytest.mark.usefixtures("untyped")  # the size of a batch is a symbol there, which the annotations do not know
@pytest.mark.parametrize("name", FIELDS)
def test_one_file_gives_the_models_outputs_for_any_batch(tmp_path, runtime, convert_to_onnx, name, rng):
    code, model, variables = convert_to_onnx(name)
    assert code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "weights.safetensors"]
    session = runtime.InferenceSession(tmp_path / "model.onnx")
    for batch in (1, 3):
        x = rng.normal(size=(batch, SIZE, SIZE, 3)).astype(np.float32)
        (found,) = session.run(None, {session.get_inputs()[0].name: x})
        wanted = np.asarray(model.apply(variables, x))
        np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.usefixtures("untyped", "runtime")
def test_a_program_with_other_outputs_is_refused_and_not_left(tmp_path, convert_to_onnx, monkeypatch, capsys):
    import jax2onnx

    export = jax2onnx.to_onnx
    monkeypatch.setattr(
        jax2onnx,
        "to_onnx",
        lambda call, *arguments, **keywords: export(lambda *x: [1.01 * y for y in call(*x)], *arguments, **keywords),
    )
    assert convert_to_onnx("swin_tiny")[0] == 1
    assert "ONNX Runtime must give the outputs of swin_tiny" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["weights.safetensors"]
