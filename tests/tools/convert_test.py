"""The conversion command: there and back, every tensor accounted for, nothing half written."""

import importlib.util
import json
import pickle
import sys
import zipfile

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

import jaxlayers
from jaxlayers.core import dialects
from jaxlayers.files import open_tensors, write_safetensors
from jaxlayers.pretrained import find_dialect, load_pretrained
from tests.round_trip import random_tensors
from tools import convert, convert_write

FIELDS = {"embed_dim": 8, "depths": (1, 1), "num_heads": (2, 2), "window_size": 2, "patch_size": 2, "num_classes": 3}
SET = [part for field, value in FIELDS.items() for part in ("--set", f"{field}={value}")]
MODEL = jaxlayers.create_model("swin_tiny", **FIELDS)
IMAGE = (jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32),)


@pytest.fixture
def weights():
    layout = find_dialect(None, MODEL, "official").layout(MODEL, dialects.shapes_of(MODEL, IMAGE))
    return random_tensors(layout)


@pytest.fixture
def run(tmp_path, capsys):
    """Run the command on places in a folder; return its exit code and what it said."""

    def call(source, out, *options, model=True):
        chosen = ["--model", "swin_tiny", *SET] if model else []
        code = convert.main(["run", str(tmp_path / source), str(tmp_path / out), *chosen, *options])
        said = capsys.readouterr()
        return code, said.out + said.err

    return call


@pytest.fixture
def official(tmp_path, weights):
    index = {"layers.0.blocks.0.attn.relative_position_index": np.zeros((4, 4), np.int64)}
    write_safetensors(tmp_path / "official.safetensors", {**weights, **index})
    return "official.safetensors"


def outputs(variables):
    return np.asarray(jax.jit(MODEL.apply)(variables, jnp.ones(IMAGE[0].shape)))


def test_there_and_back_bit_for_bit(tmp_path, run, official, weights):
    code, said = run(official, "ours")
    assert code == 0
    assert "1 ignored" in said
    assert "an index that follows from the window" in said
    assert sorted(path.name for path in (tmp_path / "ours").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    # The folder knows its model and where it came from.
    code, said = run("ours", "back.safetensors", "--to", "reference", model=False)
    assert code == 0, said
    back = open_tensors(tmp_path / "back.safetensors")
    assert set(back) == set(weights)
    for name, array in weights.items():
        np.testing.assert_array_equal(back[name], array)
    # In another reference's names, the values are the same and the names that reference's own.
    code, said = run("ours", "timm.safetensors", "--to", "reference", "--dialect", "timm", model=False)
    assert code == 0, said
    timm = open_tensors(tmp_path / "timm.safetensors")
    assert "head.fc.weight" in timm
    direct = load_pretrained(MODEL, tmp_path / "official.safetensors")
    through = load_pretrained(MODEL, tmp_path / "timm.safetensors")
    jax.tree.map(np.testing.assert_array_equal, direct, through)
    jax.tree.map(np.testing.assert_array_equal, direct, load_pretrained(MODEL, tmp_path / "ours"))


def test_the_cards_snippet_runs(tmp_path, run, official):
    assert run(official, "ours")[0] == 0
    card = (tmp_path / "ours" / "README.md").read_text()
    snippet = card.split("```python\n")[1].split("```")[0].replace("PATH/TO/THIS/FOLDER", str(tmp_path / "ours"))
    found = {"inputs": jnp.ones(IMAGE[0].shape)}
    exec(snippet, found)
    np.testing.assert_array_equal(found["outputs"].shape, (1, 3))


def test_every_tensor_is_accounted_for(tmp_path, run, weights):
    head = weights.pop("norm.weight")
    write_safetensors(tmp_path / "wrong.safetensors", {**weights, "extra.bias": head})
    code, said = run("wrong.safetensors", "ours", "--dry-run")
    assert code == 1
    assert "missing ['norm.weight'], unexpected ['extra.bias']" in said
    code, said = run("wrong.safetensors", "ours", "--allow", r"^extra\.")
    assert code == 1
    assert "missing ['norm.weight'], unexpected []" in said
    code, said = run("wrong.safetensors", "ours", "--allow", r"^extra\.", "--allow", r"^norm\.weight$")
    assert code == 0
    assert "extra.bias: in excess, by leave" in said
    assert "params/final_norm/scale: missing in the checkpoint, by leave" in said
    fresh = load_pretrained(MODEL, tmp_path / "ours")["params"]["final_norm"]["scale"]
    np.testing.assert_array_equal(fresh, np.ones(16))
    # Negative control: leave for another name is none.
    assert run("wrong.safetensors", "other", "--allow", "nothing")[0] == 1


def test_our_own_files_are_accounted_for_too(tmp_path, run, official):
    assert run(official, "ours")[0] == 0
    with pytest.raises(ValueError, match=r"unexpected \['params/head/bias', 'params/head/kernel'\]"):
        load_pretrained(MODEL.clone(num_classes=0), tmp_path / "ours")
    with pytest.raises(ValueError, match=r"missing \['params/stages_1/blocks_1/"):
        load_pretrained(MODEL.clone(depths=(1, 2)), tmp_path / "ours")
    with pytest.raises(ValueError, match="of another shape"):
        load_pretrained(MODEL.clone(num_classes=5), tmp_path / "ours", inputs=IMAGE)
    deeper = load_pretrained(MODEL.clone(depths=(1, 2)), tmp_path / "ours", allow=["stages_1/blocks_1/"])
    np.testing.assert_array_equal(deeper["params"]["stages_1"]["blocks_1"]["norm1"]["scale"], np.ones(16))


def test_a_dry_run_writes_nothing(tmp_path, run, official):
    before = sorted(tmp_path.iterdir())
    assert run(official, "ours", "--dry-run")[0] == 0
    assert sorted(tmp_path.iterdir()) == before


def test_classes_channels_and_windows_are_fitted_and_reported(tmp_path, run, official, weights):
    code, said = run(
        official,
        "ours",
        "--set",
        "num_classes=5",
        "--set",
        "window_size=4",
        "--was",
        "window_size=2",
        "--channels",
        "1",
    )
    assert code == 0, said
    assert "the classifier of 3 classes begins anew for 5" in said
    assert "the first kernel for 3 channels is spread over 1" in said
    assert "window_size 2 to 4" in said
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert len(config["source"]["changed"]) == 3
    model = MODEL.clone(num_classes=5, window_size=4)
    params = load_pretrained(model, tmp_path / "ours")["params"]
    assert params["head"]["kernel"].shape == (16, 5)
    assert params["stages_0"]["blocks_0"]["attention"]["relative_position_bias_table"].shape == (49, 2)
    # A grey picture gets the response of the same grey in three channels.
    kernel = params["patch_embed"]["projection"]["kernel"].reshape(2, 2, 1, 8)
    theirs = np.moveaxis(weights["patch_embed.proj.weight"], (0, 1), (3, 2))
    np.testing.assert_allclose(kernel[:, :, 0], theirs.sum(axis=2), rtol=1e-5)
    # What is no longer the reference's model has another layout than its file had.
    code, said = run("ours", "back.safetensors", "--to", "reference", model=False)
    assert code == 0, said
    assert open_tensors(tmp_path / "back.safetensors").stored["head.weight"].shape == (5, 16)


def test_orbax_msgpack_and_npz_hold_the_same(tmp_path, run, official):
    expected = load_pretrained(MODEL, tmp_path / official)
    assert run(official, "orbax", "--to", "orbax")[0] == 0
    with ocp.StandardCheckpointer() as checkpointer:
        jax.tree.map(np.testing.assert_array_equal, checkpointer.restore(tmp_path / "orbax", expected), expected)
    jax.tree.map(np.testing.assert_array_equal, load_pretrained(MODEL, tmp_path / "orbax"), expected)
    assert run(official, "x.msgpack", "--to", "msgpack")[0] == 0
    found = flax.serialization.from_bytes(expected, (tmp_path / "x.msgpack").read_bytes())
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    np.savez(tmp_path / "x.npz", **open_tensors(tmp_path / official))
    jax.tree.map(np.testing.assert_array_equal, load_pretrained(MODEL, tmp_path / "x.npz"), expected)


@pytest.mark.usefixtures("untyped")  # the size of a batch is a symbol there, which the annotations do not know
def test_the_exported_program_takes_any_batch(tmp_path, run, official):
    assert run(official, "program", "--to", "stablehlo", "--image-size", "8")[0] == 0
    program = jax.export.deserialize((tmp_path / "program" / "model.stablehlo").read_bytes())
    variables = load_pretrained(MODEL, tmp_path / "program")
    for batch in (1, 3):
        x = jnp.asarray(np.random.default_rng(0).normal(size=(batch, 8, 8, 3)), jnp.float32)
        np.testing.assert_allclose(program.call(variables, x), MODEL.apply(variables, x), atol=1e-5)


def test_dtype_is_that_asked_for(tmp_path, run, official):
    assert run(official, "half", "--dtype", "bfloat16")[0] == 0
    assert {str(one.dtype) for one in open_tensors(tmp_path / "half").stored.values()} == {"bfloat16"}


def test_a_run_that_breaks_off_is_taken_up_and_never_half_there(tmp_path, run, official, monkeypatch):
    write, seen = convert_write.files.write_safetensors, []

    def breaks(path, *arguments, **keywords):
        seen.append(path.name)
        if len(seen) == 3:
            raise OSError("no space left")
        return write(path, *arguments, **keywords)

    monkeypatch.setattr("jaxlayers.files.write_safetensors", breaks)
    with pytest.raises(OSError, match="no space"):
        run(official, "ours", "--shard-size", "6000")
    assert not (tmp_path / "ours").exists()
    done = seen[:2]
    seen.extend([""])  # from now on nothing breaks
    code, said = run(official, "ours", "--shard-size", "6000")
    assert code == 0, said
    assert not set(done) & set(seen[4:]), "what was finished is not written again"
    jax.tree.map(
        np.testing.assert_array_equal,
        load_pretrained(MODEL, tmp_path / "ours"),
        load_pretrained(MODEL, tmp_path / official),
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["official.safetensors", "ours"]


def test_another_conversion_does_not_take_up_what_is_left(tmp_path, run, official):
    (tmp_path / ".ours.partial").mkdir()
    (tmp_path / ".ours.partial" / "progress.json").write_text("{}")
    code, said = run(official, "ours")
    assert code == 1
    assert "left from another conversion" in said


def test_what_is_there_is_not_written_over(tmp_path, run, official):
    (tmp_path / "taken").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for out in ("taken", "link"):
        code, said = run(official, out)
        assert code == 1
        assert "must not exist yet" in said
    assert run(official, "no/such/folder")[0] == 1
    assert not (tmp_path / "elsewhere").exists()


def test_a_huggingface_folder_says_which_model_it_is(tmp_path, run):
    config = {
        "model_type": "swin",
        "embed_dim": 8,
        "depths": [1, 1],
        "num_heads": [2, 2],
        "window_size": 2,
        "patch_size": 2,
        "id2label": {"0": "a", "1": "b", "2": "c"},
    }
    layout = find_dialect(None, MODEL, "huggingface").layout(MODEL, dialects.shapes_of(MODEL, IMAGE))
    (tmp_path / "hub").mkdir()
    write_safetensors(tmp_path / "hub" / "model.safetensors", random_tensors(layout))
    (tmp_path / "hub" / "config.json").write_text(json.dumps(config))
    code, said = run("hub", "ours", model=False)
    assert code == 0, said
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["source"]["dialect"] == "huggingface"
    (tmp_path / "hub" / "config.json").write_text(json.dumps({**config, "use_absolute_embeddings": True}))
    assert "another model" in run("hub", "other", model=False)[1]
    (tmp_path / "hub" / "config.json").write_text(json.dumps({"model_type": "bert"}))
    assert "model_type='bert' must be one of" in run("hub", "other", model=False)[1]


class Attack:
    def __reduce__(self):
        return (open, ("pwned", "w"))


def test_hostile_files_are_refused_and_nothing_happens(tmp_path, run, monkeypatch, weights):
    monkeypatch.chdir(tmp_path)
    with zipfile.ZipFile(tmp_path / "evil.pth", "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"head.weight": Attack()}))
    write_safetensors(tmp_path / "secret.safetensors", weights)
    (tmp_path / "cut").mkdir()
    places = dict.fromkeys(weights, "../secret.safetensors")
    (tmp_path / "cut" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    bad = {**weights, "norm.weight": np.full_like(weights["norm.weight"], np.nan)}
    write_safetensors(tmp_path / "nan.safetensors", bad)
    before = sorted(tmp_path.rglob("*"))
    for source, reason in (
        ("evil.pth", "open"),
        ("cut", "must be a plain name in the folder"),
        ("nan.safetensors", "must be finite"),
        ("nothing", "does not exist"),
    ):
        code, said = run(source, "ours")
        assert code == 1, source
        assert reason in said
    assert sorted(tmp_path.rglob("*")) == before


def test_list_and_inspect(tmp_path, official, capsys):
    assert convert.main(["list", "swinv2"]) == 0
    assert "github.com/microsoft/Swin-Transformer" in capsys.readouterr().out
    assert convert.main(["list", "no such model"]) == 1
    capsys.readouterr()
    assert convert.main(["inspect", str(tmp_path / official), "--depth", "2"]) == 0
    said = capsys.readouterr().out
    assert "patch_embed.proj  2 tensors" in said
    assert "names like those of Swin/official; of no named size" in said
    assert convert.main(["inspect", str(tmp_path / official), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tensors"]["head.weight"]["shape"] == [3, 16]


def test_a_named_model_is_guessed(tmp_path, capsys):
    model, image = jaxlayers.create_model("convnext_atto", num_classes=7), jaxlayers.abstract_inputs("convnext_atto")
    layout = find_dialect(None, model, "torchvision").layout(model, dialects.shapes_of(model, image))
    write_safetensors(tmp_path / "x.safetensors", {name: np.zeros(shape, np.float32) for name, shape in layout.items()})
    assert convert.main(["inspect", str(tmp_path / "x.safetensors")]) == 0
    assert "looks like convnext_atto, as torchvision has it" in capsys.readouterr().out


def test_verification_without_the_reference_looks_at_values(run, official):
    code, said = run(official, "ours", "--dry-run", "--verify")
    assert code == 0
    assert "not run beside the reference: the reference is github.com/microsoft/Swin-Transformer" in said
    assert "params/head: 51 values, mean" in said
    if importlib.util.find_spec("timm") is None:
        code, said = run(official, "ours", "--dry-run", "--verify", "--reference", "timm:swin_tiny_patch4_window7_224")
        assert code == 1
        assert "--verify needs timm" in said


def test_wrong_arguments_say_what_is_known(run, official):
    assert "did you mean" in run(official, "ours", "--model", "swin_tinny")[1]
    assert "must be one of ['huggingface'" in run(official, "ours", "--dialect", "tim")[1]
    assert "must be FIELD=VALUE" in run(official, "ours", "--set", "depths")[1]
    assert "must be a regular expression" in run(official, "ours", "--allow", "(")[1]
    assert "must end in .safetensors" in run(official, "ours", "--to", "reference")[1]
    with pytest.raises(SystemExit) as stopped:
        run(official, "ours", "--to", "gzip")
    assert stopped.value.code == 2


def test_onnx_says_what_it_needs(tmp_path, run, official, monkeypatch):
    monkeypatch.setitem(sys.modules, "jax2onnx", None)
    code, said = run(official, "model.onnx", "--to", "onnx", "--image-size", "8")
    assert code == 1
    assert "pip install jaxlayers[onnx]" in said
    assert [path.name for path in tmp_path.iterdir()] == [official]
