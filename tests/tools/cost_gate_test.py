"""The gate of costs: what is 3 % worse fails with the numbers, what is not passes, and nothing is left out."""

import operator

import jax
import jax.numpy as jnp
import pytest

import jaxlayers
from jaxlayers import models
from tools import cost_gate
from tools.cost_gate import FIGURES

VERSIONS = "jax 1, libtpu 2"
FOUND = {"flops": 1000, "bytes": 2000, "cycles": 3000, "temporaries": 10**7}
STEP = "convnext_tiny"


@pytest.fixture
def gate(tmp_path, monkeypatch, capsys):
    """Return the function that runs the gate on figures that the compiler is said to give."""

    def call(figures, *options, stored=None, versions=VERSIONS):
        monkeypatch.setattr(
            cost_gate,
            "measured",
            lambda entries, python, workers: ((entry.variant, figures, versions) for entry in entries),
        )
        path = tmp_path / "costs" / "steps.txt"
        if stored is not None:
            path.parent.mkdir(exist_ok=True)
            path.write_text(cost_gate.written(VERSIONS, stored))
        code = cost_gate.main([STEP, *options, "--stored", str(path), "--python", __file__])
        return code, "".join(capsys.readouterr()), path

    return call


def test_a_file_of_costs_is_read_as_it_was_written():
    costs = {"a": FOUND, "longer": dict.fromkeys(FIGURES, 7)}
    assert cost_gate.read(cost_gate.written(VERSIONS, costs)) == (VERSIONS, costs)
    for text in ("", "a b\n", "# jax 1\nstep flops\n"):
        with pytest.raises(ValueError, match="must begin with versions"):
            cost_gate.read(text)


@pytest.mark.parametrize("figure", FIGURES)
def test_three_per_cent_more_fail_with_the_numbers_and_less_passes(gate, figure):
    assert gate(FOUND, stored={STEP: FOUND})[0] == 0
    assert gate({**FOUND, figure: round(1.029 * FOUND[figure])}, stored={STEP: FOUND})[0] == 0
    code, said, _ = gate({**FOUND, figure: round(1.04 * FOUND[figure])}, stored={STEP: FOUND})
    assert code == 1
    assert f"{STEP}: {figure} {FOUND[figure]:,} -> {round(1.04 * FOUND[figure]):,} (+4.0%)" in said
    code, said, _ = gate({**FOUND, figure: round(0.9 * FOUND[figure])}, stored={STEP: FOUND})
    assert code == 0
    assert "better than stored" in said


def test_worse_figures_are_accepted_by_writing_them(gate):
    worse = {name: 2 * value for name, value in FOUND.items()}
    assert gate(worse, stored={STEP: FOUND})[0] == 1
    code, _, path = gate(worse, "--write", stored={STEP: FOUND})
    assert code == 0
    assert cost_gate.read(path.read_text()) == (VERSIONS, {STEP: worse})
    assert gate(worse)[0] == 0


def test_what_cannot_be_compared_fails(gate):
    assert "is new" in gate(FOUND, stored={})[1]
    assert gate(FOUND, stored={})[0] == 1
    code, said, _ = gate(FOUND, stored={STEP: FOUND, "gone": FOUND})
    assert code == 1
    assert "gone: is stored and no longer compiled" in said
    code, said, _ = gate(FOUND, stored={STEP: FOUND}, versions="jax 2, libtpu 2")
    assert code == 1
    assert "stored are figures of jax 1, libtpu 2, these are of jax 2, libtpu 2" in said
    code, said, path = gate("out of memory", "--write", stored={STEP: FOUND})
    assert code == 1
    assert "out of memory" in said
    assert cost_gate.read(path.read_text())[1] == {STEP: FOUND}


def test_wrong_uses_say_what_is_known(capsys):
    assert cost_gate.main(["no_such_step"]) == 2
    assert STEP in capsys.readouterr().err
    assert cost_gate.main([STEP, "--python", "no/python"]) == 2
    assert "make .venv-tpu/.ready" in capsys.readouterr().err


def test_steps_are_named_models_with_fields_they_have():
    names = [entry.variant for entry in cost_gate.ENTRIES]
    assert len(names) == len(set(names))
    assert set(names) <= set(jaxlayers.list_models())
    assert set(names) > cost_gate.QUICK
    # None of a family is forgotten.
    families = {models.variant_module(name).__name__ for name in jaxlayers.list_models()}
    held = {models.variant_module(name).__name__ for name in names}
    assert held == families
    for entry in cost_gate.ENTRIES:
        model = jaxlayers.create_model(entry.variant)
        for field in entry.fields:
            operator.attrgetter(field.partition("=")[0])(model)


def test_figures_of_a_program_count_its_products():
    def product(size):
        x = jnp.zeros((size, size))
        return cost_gate.figures_of(jax.jit(jnp.matmul).lower(x, x).compile())

    small, large = product(64), product(128)
    assert set(small) == set(FIGURES)
    assert small["flops"] == 2 * 64**3
    assert large["flops"] == 8 * small["flops"]
    assert large["bytes"] > small["bytes"] > 0
