"""Every case of every layer, held to the same ten checks; the default suite makes all ten for a few of each family."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest

from jaxlayers.testing import conformance
from tools import cost_gate

HERE = Path(__file__).parent
GOLDEN = HERE / "golden" / "parameters"
COSTS = HERE / "golden" / "costs" / "cases"


def load(path):
    """Import a test file by its place, under the name pytest gives it."""
    name = ".".join(path.relative_to(HERE.parent).with_suffix("").parts)
    if name not in sys.modules:
        specification = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(specification)
        sys.modules[name] = module
        specification.loader.exec_module(module)
    return sys.modules[name]


def collect_cases():
    files = [path for path in sorted(HERE.glob("*/*_test.py")) if path.parent.name != "parity"]
    files = [path for path in files if "\nCASES" in path.read_text()]
    return [case for path in files for case in load(path).CASES]


CASES = collect_cases()
# A worker runs all checks of a case one after the other, since they share its variables and compiled programs.
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
# Modules that run inside that of another case leave to the extended suite what it shows of them as well.
every_whole = pytest.mark.parametrize(
    "case", [pytest.param(case, id=case.name, marks=[pytest.mark.slow] if case.within else []) for case in CASES]
)
# The checks that compile most and that change with the shared floors below, not with a layer, are made by default for
# a few of each family, and for all in the extended suite.
REPRESENTATIVES = frozenset(
    {
        "convnext",
        "egnn",
        "feed_forward",
        "frame_averaging_pointnet",
        "gcn",
        "hopfield_classifier",
        "hopular",
        "maxvit",
        "octahedral_cnn",
        "se3_transformer",
        "set_transformer",
        "styleswin",
        "swin",
        "swin_unetr",
        "swin_v2",
        "transformer_block",
        "vn_pointnet",
    }
)
representatives = pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.name, marks=[] if case.name in REPRESENTATIVES else [pytest.mark.slow])
        for case in CASES
    ],
)


def test_case_names_are_unique():
    names = [case.name for case in CASES]
    assert len(names) == len(set(names))
    assert set(names) >= REPRESENTATIVES


@pytest.mark.parametrize("part", [case for case in CASES if case.within], ids=lambda case: case.name)
def test_parts_occur_within_the_case_that_covers_them(part):
    (whole,) = (case for case in CASES if case.name == part.within)
    conformance.check_part(part, whole)


@every_case
def test_parameter_tree_is_the_stored_one(case, request):
    stored = GOLDEN / f"{case.name}.txt"
    if request.config.getoption("--regenerate-golden"):
        stored.parent.mkdir(exist_ok=True)
        stored.write_text(conformance.parameter_tree(case))
    assert stored.exists(), f"no stored tree for {case.name}; run `make golden` and read the difference"
    conformance.check_tree(case, stored.read_text())


@every_whole
def test_parameters_can_be_made_and_give_finite_output(case):
    conformance.check_output(case)


@representatives
def test_jit_vmap_and_leading_axes_change_nothing(case):
    conformance.check_transformations(case)


@representatives
def test_every_parameter_gets_a_gradient(case):
    conformance.check_gradients(case)


@representatives
def test_bfloat16_and_float64_run(case):
    conformance.check_dtypes(case)


@every_whole
def test_declared_symmetries_hold_and_their_controls_fail(case):
    conformance.check_symmetries(case)


@representatives
def test_symmetries_survive_training_and_gradients_have_them_too(case):
    conformance.check_trained_symmetries(case)


@representatives
def test_sharded_equals_unsharded(case):
    conformance.check_sharding(case)


@representatives
def test_round_trips_give_back_the_parameters(case, tmp_path):
    conformance.check_round_trips(case, tmp_path)


@every_case
def test_wrong_uses_raise_the_stated_error(case):
    conformance.check_bad_inputs(case)


@representatives
def test_lowers_for_tpu(case):
    conformance.check_tpu_lowering(case)


@pytest.mark.tpu
@every_case
def test_compiles_for_tpu_at_the_stored_cost(case, request):
    """Hold what the compiler estimates to what is stored; `--regenerate-golden` accepts what is found."""
    pytest.importorskip("libtpu")
    assert "TPU_WORKER_HOSTNAMES" in os.environ, "run `make test-tpu`: libtpu needs its environment"
    program = conformance.check_tpu_compilation(case)
    path = COSTS / f"{case.name}.txt"
    if program is None:
        assert not path.exists()
        return
    found = cost_gate.figures_of(program)
    if request.config.getoption("--regenerate-golden"):
        COSTS.mkdir(parents=True, exist_ok=True)
        path.write_text(cost_gate.written(cost_gate.versions(), {case.name: found}))
    assert path.exists(), f"no stored cost of {case.name}; run `make golden-tpu`"
    versions, stored = cost_gate.read(path.read_text())
    assert versions == cost_gate.versions(), "stored are figures of another compiler; run `make golden-tpu`"
    worse, _ = cost_gate.compared(case.name, found, stored[case.name])
    assert not worse, f"costs more than stored; `make golden-tpu` accepts it: {worse}"
