"""Config files and `--set`: what is replaced, and what is refused with the names that would do."""

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest

from train.config import Config, MeshShape, Optim, Task, describe, load, override
from train.data import arrays

TINY = Path(__file__).parent / "tiny.py"


class Stem(nn.Module):
    features: int = 3


class Model(nn.Module):
    depths: Sequence[int] = (2, 2)
    stem: nn.Module = Stem()
    rate: float = 0.1
    width: float | int = 4
    activation_fn: Callable[..., Any] = nn.relu
    use_bias: bool = True
    untyped: Any = 3
    dtype: Any = None


@pytest.fixture
def config():
    task = Task(inputs=lambda batch: (batch["x"],), loss=lambda *_: None, evaluate=lambda *_: None)
    return Config(
        model=Model(), task=task, train_data=arrays(x=np.zeros((4, 2))), test_data=None, steps=3, batch_size=2
    )


@pytest.mark.parametrize(
    ("assignment", "value"),
    [
        ("steps=7", 7),
        ("model.depths=(1, 2, 3)", (1, 2, 3)),
        ("model.depths=[1]", (1,)),
        ("model.stem.features=9", 9),
        ("model.rate=1", 1.0),
        ("model.width=2", 2),
        ("model.use_bias=False", False),
        ("model.untyped=4", 4),
        ("model.dtype=bfloat16", jnp.dtype("bfloat16")),
        ("optim.clip_norm=None", None),
        ("optim.learning_rate=3e-4", 3e-4),
        ("optim.schedule=linear", "linear"),
        ("mesh.tensor = 4", 4),
        ("mesh.rules=(('a/kernel', (None, 'fsdp')),)", (("a/kernel", (None, "fsdp")),)),
        ("metric=accuracy", "accuracy"),
        ("labels=('a', 'b')", ("a", "b")),
    ],
)
def test_override_replaces_exactly_one_field(config, assignment, value):
    changed = override(config, [assignment])
    node = changed
    path = assignment.partition("=")[0].strip()
    for name in path.split("."):
        node = getattr(node, name)
    assert node == value
    assert type(node) is type(value)
    before, after = (dict(line.split(" = ") for line in describe(c).splitlines()) for c in (config, changed))
    assert {name for name in after if before[name] != after[name]} == {path}


def test_overrides_apply_in_turn(config):
    assert override(config, ["steps=5", "seed=2", "steps=6"]).steps == 6


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        (
            "modle.depths=1",
            "Config has no field 'modle'; the nearest is 'mode' or 'model'; its fields are model, ",
        ),
        (
            "model.depth=3",
            "Model has no field 'depth'; the nearest is 'depths' or 'width'; its fields are depths, ",
        ),
        ("optim.lr=1", "the nearest is 'learning_rate'"),
        ("model.stem.feature=1", "Stem has no field 'feature'; the nearest is 'features'; its fields are features$"),
        ("model.parent=None", "has no field 'parent'"),
        ("steps.x=1", "'steps' is of type int and has no field 'x'; set steps itself"),
        ("steps", "must have the form path=value"),
        ("model..depths=1", "must have the form path=value"),
        ("model.depths=3", r"'depths' must be .*Sequence\[int\]; it is \(2, 2\)"),
        ("model.depths=(1, 'a')", "must be .*Sequence"),
        ("model.rate=fast", "'rate' must be float; it is 0.1"),
        ("model.rate=True", "'rate' must be float"),
        ("model.use_bias=0", "'use_bias' must be bool"),
        ("model.untyped=x", "'untyped' must be of type int"),
        ("steps=1.5", "'steps' must be int"),
        ("steps=0", "steps=0 must be an integer of at least 1"),
        ("mode=best", "must be Literal"),
        ("model.dtype=bflaot16", "is not a dtype"),
        ("model.activation_fn=gelu", "holds jax.*relu, which text cannot spell; change it in the config file"),
        ("model=None", "holds Model"),
        ("optim=adam", "holds Optim"),
        ("task.loss=x", "which text cannot spell"),
        ("train_data=digits", "which text cannot spell"),
    ],
)
def test_override_refuses_with_what_would_do(config, assignment, message):
    with pytest.raises(ValueError, match=message):
        override(config, [assignment])


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("batch_size", 0, "batch_size=0 must be an integer of at least 1"),
        ("log_every", True, "log_every=True"),
        ("eval_every", 0, "eval_every=0"),
        ("keep_best", -1, "keep_best=-1 must be an integer of at least 0"),
        ("mode", "best", 'mode=\'best\' must be "max" or "min"'),
        ("model", nn.relu, "must be a flax.linen.Module"),
        ("model", Model, "must be a flax.linen.Module"),
    ],
)
def test_config_refuses_what_cannot_work(config, field, value, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(config, **{field: value})


def test_description_names_every_path_and_no_address(config):
    lines = describe(config).splitlines()
    assert "model.stem.features = 3" in lines
    assert "optim.learning_rate = 0.001" in lines
    assert "mesh.data = -1" in lines
    assert "0x" not in describe(config)
    assert describe(config) == describe(dataclasses.replace(config))


@pytest.mark.parametrize("cls", [Config, Optim, MeshShape, Task])
def test_docstrings_list_exactly_the_fields(cls):
    section = inspect.getdoc(cls).partition("Attributes:\n")[2]
    named = [
        line.strip().partition(":")[0] for line in section.splitlines() if line.startswith("  ") and line[2] != " "
    ]
    assert named == [field.name for field in dataclasses.fields(cls)]


def test_load_calls_the_files_function():
    assert load(TINY).steps == 24
    assert load(TINY, smoke=True).steps == 4


def test_load_names_what_is_wrong_with_a_file(tmp_path):
    with pytest.raises(ValueError, match=r"there is no config file .*tinny.py; did you mean .*tiny.py"):
        load(TINY.with_name("tinny.py"))
    empty, other = tmp_path / "empty.py", tmp_path / "other.py"
    empty.write_text("x = 1\n")
    with pytest.raises(ValueError, match="must define `def config"):
        load(empty)
    other.write_text("def config(smoke=False):\n    return 3\n")
    with pytest.raises(ValueError, match="it returned int"):
        load(other)
