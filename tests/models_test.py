import subprocess
import sys

import flax.linen as nn
import jax
import pytest

import jaxlayers
from jaxlayers import __main__ as command_line


def first_variants():
    """Return the first variant of every module that has some."""
    kinds = {}
    for name in jaxlayers.list_models():
        kinds.setdefault(type(jaxlayers.create_model(name)), name)
    return sorted(kinds.values())


@pytest.mark.parametrize(
    "names", [first_variants, pytest.param(jaxlayers.list_models, marks=pytest.mark.slow)], ids=["first", "all"]
)
def test_variants_build_and_run_abstractly(names):
    assert len(names()) > 5
    for name in names():
        model, inputs = jaxlayers.create_model(name), jaxlayers.abstract_inputs(name)
        assert isinstance(model, nn.Module)
        outputs = jax.eval_shape(lambda *args, model=model: model.init_with_output(jax.random.key(0), *args), *inputs)
        assert jax.tree.leaves(outputs[0])


def test_list_models_takes_wildcards():
    assert "swin_tiny" in jaxlayers.list_models("Swin_*")
    assert all(name.startswith("swin") for name in jaxlayers.list_models("swin*"))
    assert jaxlayers.list_models("nothing_like_it*") == []


def test_a_misspelt_model_answers_with_the_nearest():
    with pytest.raises(ValueError, match=r"no model 'swin_tinny'; did you mean .*swin_tiny"):
        jaxlayers.create_model("swin_tinny")


def test_a_misspelt_field_answers_with_the_nearest_and_the_list():
    with pytest.raises(ValueError, match=r"no field 'depth'.*did you mean depths.*its fields are \["):
        jaxlayers.create_model("swin_tiny", depth=(1, 1))


def test_abstract_inputs_take_a_batch_size():
    assert jaxlayers.abstract_inputs("swin_base_384", batch_size=3)[0].shape == (3, 384, 384, 3)
    # The memory of a table is the same for all rows that are asked about.
    assert [x.shape for x in jaxlayers.abstract_inputs("hopular_small", batch_size=3)] == [(3, 31), (256, 31)]
    with pytest.raises(ValueError, match="batch_size=0 must be at least 1"):
        jaxlayers.abstract_inputs("swin_tiny", batch_size=0)


def test_list_prints_names_and_fails_when_nothing_matches(capsys):
    assert command_line.main(["list", "swin_tiny*"]) == 0
    assert capsys.readouterr().out.split() == ["swin_tiny", "swin_tiny_384"]
    assert command_line.main(["list", "nothing*"]) == 1


def test_find_prints_path_and_first_line(capsys):
    assert command_line.main(["find", "hopfield"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("jaxlayers/hopfield/hopfield.py: Hopfield: ") for line in lines)
    assert command_line.main(["find", "no such word"]) == 1


def test_summary_prints_the_published_counts(capsys):
    assert command_line.main(["summary", "swin_tiny", "--depth", "1"]) == 0
    out = capsys.readouterr().out
    assert "28,288,354 parameters" in out
    assert "4.49" in out


def test_summary_of_a_misspelt_model_exits_with_two(capsys):
    assert command_line.main(["summary", "swim_tiny"]) == 2
    assert "did you mean swin_tiny" in capsys.readouterr().err


def test_it_runs_as_a_module():
    command = [sys.executable, "-m", "jaxlayers", "list", "swin_tiny"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "swin_tiny\n"
