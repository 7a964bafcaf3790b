"""Plans: chips and topologies, estimates and their order, memory by shapes, the report, and real compilations."""

import json
import math
import os
import sys
from html.parser import HTMLParser
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType
from rich.console import Console

from tools import chips, plan, plan_compile, plan_count, plan_predict, plan_report, plan_search
from train import hardware
from train import mesh as meshes
from train.config import Config, Optim
from train.data import arrays
from train.tasks import classification

ROOT = Path(__file__).parents[2]
DIGITS = str(ROOT / "configs" / "swin_digits.py")


# Chips ----------------------------------------------------------------------------------------------------------------


def test_topologies_are_read_by_name():
    place = chips.topology("v5p:16x16x24")
    assert (place.chips, place.devices, place.grid) == (6144, 6144, (16, 16, 24))
    assert chips.topology("tpu7x:2x2x1").devices == 8  # two of a chip, which share its peak and memory
    assert chips.topology("tpu7x:2x2x1").peak == pytest.approx(2307e12 / 2)
    assert chips.topology("H100:8").devices == 8


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("v5e-256", r"must be a known chip and its slice; did you mean v5e:16x16\?; known are\n  v4:"),
        ("v9:2x2", r"known are\n  v4:\{2x2x1"),
        ("v5e:2x2x2", r"must be of the form v5e:AxB; known are\n  v5e:\{1x1,2x2"),
        ("v5e", "must be of the form v5e:AxB"),
        ("v5p:0x2x2", "must be of the form v5p:AxBxC"),
        ("h100:many", "must be of the form h100:N"),
    ],
)
def test_a_wrong_topology_lists_the_known_ones(name, words):
    with pytest.raises(ValueError, match=words):
        chips.topology(name)


def test_clock_and_peak_agree_with_whole_matrix_units():
    units = {"v4": 8, "v5e": 4, "v5p": 8, "v6e": 4, "tpu7x": 8}
    sides = {"v6e": 256, "tpu7x": 256}
    for name, chip in chips.CHIPS.items():
        if chip.is_tpu:
            cycle = 2 * units[name] * sides.get(name, 128) ** 2
            assert chip.clock * cycle == pytest.approx(chip.peak, rel=2e-3), name
        assert chip.source.startswith("https://")


def test_peaks_are_those_that_training_logs():
    for chip in chips.CHIPS.values():
        assert hardware.PEAK_FLOPS[chip.kind] == pytest.approx(chip.peak / chip.devices), chip.name


def test_rings_close_and_double_where_the_torus_lets_them():
    small, whole = chips.topology("v5e:4x4"), chips.topology("v5e:16x16")
    assert whole.ring(16) == 2 * small.ring(4) == 2 * whole.chip.link
    assert whole.ring(256) == 2 * whole.ring(16)
    assert chips.topology("h100:8").ring(8) == chips.CHIPS["h100"].link


# Counting by shapes ---------------------------------------------------------------------------------------------------


def small(**changes):
    """A perceptron whose counts can be done by hand: 64 -> 256 -> 10, no biases."""
    import flax.linen as nn

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(256, use_bias=False, name="wide")(x)
            return nn.Dense(10, use_bias=False, name="head")(nn.relu(x))

    data = arrays(x=np.zeros((32, 64), np.float32), label=np.zeros(32, np.int32))
    settings = {"steps": 10, "batch_size": 32, "optim": Optim(clip_norm=None), **changes}
    return Config(Net(), classification(10, inputs=("x",), label="label"), data, data, **settings)


BATCH = {"x": jax.ShapeDtypeStruct((32, 64), jnp.float32), "label": jax.ShapeDtypeStruct((32,), jnp.int32)}


def mesh_of(**sizes):
    found = {axis: sizes.get(axis, 1) for axis in plan_search.AXES}
    return AbstractMesh(tuple(found.values()), tuple(found), axis_types=(AxisType.Auto,) * 4)


def test_counts_are_those_of_the_shapes():
    found = plan_count.count(small(), mesh_of(data=8), BATCH)
    parameters = 64 * 256 + 256 * 10
    assert found["parameters"] == parameters
    assert found["bytes"]["parameters"] == 4 * parameters
    assert found["bytes"]["optimiser"] - 2 * 4 * parameters in range(0, 64)  # two moments, and counters
    assert found["bytes"]["batch"] == (32 // 8) * (64 + 1) * 4
    # Forwards, for the weights, and of the second layer for its input.
    assert found["model_flops"] == 2 * 32 * (2 * parameters + 256 * 10)
    # At least the hidden activations and what relu passes on; no more than a dozen arrays like them.
    hidden = 4 * (32 // 8) * 256
    assert hidden <= found["activation_bytes"] <= 12 * hidden


def test_fsdp_splits_the_state_and_pieces_the_activations():
    plain = plan_count.count(small(), mesh_of(data=8), BATCH)
    split = plan_count.count(small(), mesh_of(data=2, fsdp=4), BATCH)
    assert split["bytes"]["parameters"] == plain["bytes"]["parameters"] // 4
    pieces = plan_count.count(small(accumulate=2), mesh_of(data=8), BATCH)
    assert pieces["activation_bytes"] == plain["activation_bytes"] / 2
    assert pieces["bytes"] == plain["bytes"]
    assert pieces["model_flops"] == plain["model_flops"]


def test_recomputation_keeps_less_and_computes_more_but_is_no_more_work_of_the_model():
    none = plan_count.count(small(), mesh_of(data=8), BATCH)
    dots = plan_count.count(small(remat="full"), mesh_of(data=8), BATCH)
    assert dots["activation_bytes"] < none["activation_bytes"]
    assert dots["program_flops"] > none["program_flops"] == none["model_flops"] == dots["model_flops"]


def test_a_survey_agrees_with_the_counts():
    sizes = [{"data": 8, "fsdp": 1, "sequence": 1, "tensor": 1}, {"data": 2, "fsdp": 4, "sequence": 1, "tensor": 1}]
    found = plan_count.survey(small(), BATCH, sizes)
    for size, held in zip(sizes, found["meshes"], strict=True):
        assert held == plan_count.count(small(), mesh_of(**size), BATCH)["bytes"]
    one = plan_count.count(small(), mesh_of(data=8), BATCH)
    assert found["policies"]["none"]["activation_bytes"] == 8 * one["activation_bytes"]


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="batch_size=32 must be divisible by data\\*fsdp=64"):
        plan_count.count(small(), mesh_of(data=64), BATCH)


def test_records_come_from_the_small_form_where_the_data_is_missing(monkeypatch, tmp_path):
    monkeypatch.delenv("IMAGENET", raising=False)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    job = plan_compile.Job(str(ROOT / "configs" / "swin_imagenet.py"), "v5e:4x4")
    config = plan_compile.resolved(job)
    batch, origin = plan_compile.example(config, job)
    assert batch["image"].shape == (1024, 224, 224, 3)
    assert "small form" in origin
    assert plan_compile.abstract_mesh(config, 16).shape["data"] == 16  # its own mesh is for eight


def test_variants_are_planned_by_name():
    config = plan_compile.loaded("fit_6400")
    assert (config.model.image_size, config.model.remat, jnp.dtype(config.model.dtype)) == (6400, "full", jnp.bfloat16)
    assert config.train_data[0]["input_0"].shape == (6400, 6400, 3)
    assert config.task.num_classes == 1000


def test_variants_are_planned_at_other_sizes_too():
    config = plan_compile.loaded("convnext_atto:96")
    assert config.train_data[0]["input_0"].shape == (96, 96, 3)
    for name in ("convnext_atto:0", "convnext_atto:large", "se3_particles:8"):
        with pytest.raises(ValueError, match="must name a positive size of the map"):
            plan_compile.loaded(name)


@pytest.mark.parametrize(
    ("variant", "shapes"),
    [
        ("energy_transformer_base", {"input_0": (8, 197, 768)}),
        ("se3_particles", {"input_0": (8, 5, 3), "input_1": (8, 5, 3), "input_2": (8, 5, 1)}),
        # Its memory is shared by the batch, and its result has several parts.
        ("hopular_small", {"input_0": (8, 31), "input_1": (8, 256, 31)}),
    ],
)
def test_variants_that_are_no_classifiers_are_planned_by_name(variant, shapes):
    job = plan_compile.Job(variant, "v5e:2x2", batch_size=8, compile=False)
    config = plan_compile.resolved(job)
    batch, _ = plan_compile.example(config, job)
    assert {name: x.shape for name, x in batch.items()} == shapes
    assert plan_count.count(config, mesh_of(data=4), batch)["model_flops"] > 0


# Searching ------------------------------------------------------------------------------------------------------------


PLACE = chips.topology("v5e:16x16")
GIB = 2**30


def surveyed(parameters=1 * GIB, activations=256 * GIB):
    tried = plan_search.meshes(256, tensor=2, sequence=1)
    held = [
        {
            "parameters": parameters // mesh["fsdp"] // mesh["tensor"],
            "optimiser": 2 * parameters // mesh["fsdp"] // mesh["tensor"],
            "averages": 0,
            "other state": 0,
            "batch": 2**20,
        }
        for mesh in tried
    ]
    policies = {
        "none": {"program_flops": 1e17, "activation_bytes": activations},
        "full": {"program_flops": 1.33e17, "activation_bytes": activations / 10},
    }
    return {"meshes": held, "policies": policies, "model_flops": 1e17}, tried


def ordered(limit=15 * GIB, **changes):
    survey, tried = surveyed(**changes)
    found = plan_search.candidates(survey, tried, PLACE, batch_size=1024, surveyed=1024, batches=[1024])
    return plan_search.ranked(list(found), limit)


def test_meshes_multiply_to_the_devices():
    found = plan_search.meshes(256)
    assert found[0] == {"data": 256, "fsdp": 1, "sequence": 1, "tensor": 1}
    assert all(math.prod(mesh.values()) == 256 for mesh in found)
    assert plan_search.meshes(256, given={"data": 64, "fsdp": 4}) == [
        {"data": 64, "fsdp": 4, "sequence": 1, "tensor": 1}
    ]
    assert {mesh["tensor"] for mesh in plan_search.meshes(256, given={"data": -1, "tensor": 4})} == {4}


def test_a_small_model_is_ranked_as_plain_data_parallel_without_recomputation():
    first = ordered(parameters=GIB // 100)[0]
    assert (first.mesh["data"], first.remat, first.accumulate) == (256, "none", 1)


def test_a_model_that_fills_the_device_is_split():
    order = ordered(parameters=10 * GIB)
    assert order[0].mesh["fsdp"] > 1
    assert order[0].needed <= 15 * GIB
    # What fits comes before what does not, whatever its speed.
    fits = [each.needed <= 15 * GIB for each in order]
    assert fits == sorted(fits, reverse=True)
    assert True in fits and False in fits  # noqa: PT018


def test_large_activations_are_recomputed_or_taken_in_pieces():
    first = ordered(parameters=GIB // 100, activations=256 * 100 * GIB)[0]
    assert first.remat == "full" or first.accumulate > 1
    assert first.needed <= 15 * GIB


def test_only_batches_that_divide_are_tried():
    survey, tried = surveyed()
    found = list(plan_search.candidates(survey, tried, PLACE, batch_size=96, surveyed=96, batches=[96]))
    assert all(96 % (each.mesh["data"] * each.mesh["fsdp"] * each.accumulate) == 0 for each in found)
    assert not [each for each in found if each.mesh["data"] == 256]


def test_a_few_compilations_see_several_meshes():
    picked = plan_search.chosen(ordered(), 6, alike=2)
    assert len({json.dumps(each.mesh) for each in picked}) >= 3


# The report -----------------------------------------------------------------------------------------------------------


def answered(**changes):
    reading = {
        "cycles": 15_030_000,
        "by_kind": {"product": 10_000_000, "copy": 2_024_000, "kernel": 3_006_000},
        "by_kernel": {"window_attention": 3_006_000},
        "by_module": [
            {"module": "stages_0/blocks_0/up", "backward": False, "cycles": 5_010_000},
            {"module": "stages_0/blocks_0/down", "backward": True, "cycles": 10_020_000},
        ],
        "heaviest": [
            {
                "name": "fusion.1",
                "kind": "product",
                "module": "stages_0/blocks_0/down",
                "backward": True,
                "what": "<dot & general>",
                "cycles": 10_020_000,
                "count": 1,
            }
        ],
        "bytes": 819_000_000,
        "sent": [
            {
                "kind": "all-reduce",
                "axes": ["data"],
                "bytes": 4000,
                "count": 1,
                "group_size": 4,
                "seconds": 2e-3,
            }
        ],
        "exposed": 1e-3,
        "unknown_loops": 1,
        "opaque": 0,
        "live": {"activations": 600, "temporaries": 200},
    }
    sizes = {"argument": 5 * GIB, "output": 4 * GIB, "alias": 4 * GIB, "temp": 3 * GIB, "generated_code": GIB // 4}
    held = {"parameters": GIB, "optimiser": 2 * GIB, "averages": 0, "other state": 12, "batch": GIB}
    found = {
        "title": "A <run>",
        "batch_size": 512,
        "accumulate": 1,
        "remat": "none",
        "records": "a record",
        "devices": 4,
        "mesh": {"data": 4, "fsdp": 1, "sequence": 1, "tensor": 1},
        "versions": {"jax": "1"},
        "count": {
            "parameters": 7,
            "bytes": held,
            "model_flops": 4 * 197e12 * 5.5e-3,
            "program_flops": 4 * 197e12 * 6e-3,
            "activation_bytes": 2 * GIB,
            "modules": {"head": 1.0},
        },
        "calibration": {"product": 8192.0, "cycles": 9_557_312.0, "available": 15.75 * GIB},
        "train": {"memory": sizes, "reading": reading, "kernels": [], "compile_seconds": 3.0, "compiler_flops": 1.0},
    }
    return found | changes


V5E = chips.topology("v5e:2x2")


def test_time_is_cycles_over_the_clock_and_what_collectives_leave_exposed():
    time = plan_predict.report(answered(), V5E, "c.py")["time"]
    assert time["computing"] == pytest.approx(10e-3)
    assert time["memory"] == pytest.approx(1e-3)
    assert (time["least"], time["step"], time["most"]) == pytest.approx((10e-3, 11e-3, 12e-3))
    assert time["mfu"] == pytest.approx(0.5)
    assert time["examples_per_second_per_chip"] == pytest.approx(512 / 11e-3 / 4)


def test_memory_by_kind_adds_up_to_what_is_needed():
    memory = plan_predict.report(answered(), V5E, "c.py")["memory"]
    kinds = memory["kinds"]
    assert sum(kinds.values()) == memory["needed"] == (5 + 3 + 0.25) * GIB
    assert kinds["activations"] == 600  # as the schedule has them, below the compiler's sum
    assert kinds["padding of arguments"] == pytest.approx(GIB, abs=100)
    assert memory["fits"] is True
    assert memory["spare"] == (15.75 - 8.25) * GIB


def test_a_refusal_does_not_fit_and_says_by_how_much():
    refused = {"refused": "RESOURCE_EXHAUSTED", "needed": 20 * GIB, "available": 15.75 * GIB, "compile_seconds": 1.0}
    report = plan_predict.report(answered(train=refused), V5E, "c.py")
    assert (report["memory"]["fits"], report["time"]) == (False, None)
    assert report["memory"]["spare"] == pytest.approx(-4.25 * GIB)
    assert "DOES NOT FIT: 20.00 GiB of 15.75 GiB a device, 4.25 GiB too much" in plan_report.verdict(report)
    # Temporaries alone come on top of the state.
    alone = {"refused": "RESOURCE_EXHAUSTED", "temporaries": 20 * GIB, "available": 15.75 * GIB}
    report = plan_predict.report(answered(train=alone), V5E, "c.py")
    assert report["memory"]["needed"] == pytest.approx(24 * GIB)
    # Where the compiler gives no figures none are made up.
    silent = plan_predict.report(answered(train={"refused": "RESOURCE_EXHAUSTED"}), V5E, "c.py")
    assert "does not say by how much" in plan_report.verdict(silent)


def test_without_a_compiler_shapes_are_reported_as_estimates():
    report = plan_predict.report(answered(train=None, calibration={}), V5E, "c.py")
    assert report["memory"]["kinds"]["activations (estimate)"] == 2 * GIB
    assert "(estimate)" in plan_report.verdict(report)
    assert report["time"]["estimate"]
    assert any("Nothing was compiled" in line for line in report["assumptions"])
    # A use of the peak that was assumed is not shown as one that was found.
    assert "MFU" not in dict(plan_report.lines(report))
    assert report["modules"] == [{"module": "head", "forward": 1.0, "backward": 0.0, "share": 1.0}]


def test_a_gpu_is_a_roofline_and_marked_as_estimate():
    place = chips.topology("h100:4")
    report = plan_predict.report(answered(calibration={}), place, "c.py")
    assert report["time"]["estimate"]
    assert report["time"]["step"] == pytest.approx(
        max(197e12 * 6e-3 / (0.5 * place.peak), 819e6 / place.bandwidth) + 2e-3
    )
    assert any(line.startswith("ESTIMATE") for line in report["assumptions"])


def test_cycles_of_kernels_are_told_and_so_is_what_is_not_known_of_them():
    def told(**rows):
        train = {**answered()["train"], **rows}
        return plan_predict.report(answered(train=train), V5E, "c.py")

    report = told()
    assert dict(plan_report.lines(report))["cycles"] == "product 66.5%, kernel 20.0%, copy 13.5%"
    assert dict(plan_report.lines(report))["of kernels"] == "window_attention 20.0%"
    assert any("Pallas kernels" in line and "lower bound" in line for line in report["assumptions"])
    row = {"name": "window_attention", "steps": 4, "bundles": 9, "unknown_loops": 1, "error": ""}
    assert any("counted as one turn each: window_attention." in line for line in told(kernels=[row])["assumptions"])
    # Without kernels nothing is said of any.
    reading = {**answered()["train"]["reading"], "by_kernel": {}}
    assert not any("kernels" in line for line in told(reading=reading)["assumptions"])
    failed = told(reading={**reading, "opaque": 3}, kernels=[{**row, "unknown_loops": 0, "error": "it died"}])
    assert any("3 calls of custom kernels" in line and "it died" in line for line in failed["assumptions"])


def test_modules_are_summed_down_to_a_depth():
    (module,) = plan_predict.report(answered(), V5E, "c.py")["modules"]
    assert module["module"] == "stages_0/blocks_0"
    assert (module["forward"], module["backward"]) == pytest.approx((1 / 3, 2 / 3))


class Checked(HTMLParser):
    """Counts tags, and that each is closed."""

    def __init__(self, text):
        super().__init__()
        self.open, self.seen, self.words = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        if tag not in ("meta", "rect", "line"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in ("rect", "line"):
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.words += data


def test_the_report_is_written_as_json_and_as_a_page_with_pictures(tmp_path):
    report = plan_predict.report(answered(), V5E, "c.py")
    page = plan_report.write(report, tmp_path, [report, {"error": "no", "mesh": {}}])
    again = json.loads((tmp_path / "plan.json").read_text())
    assert again["plan"] == json.loads(json.dumps(report))
    assert len(again["others"]) == 2
    checked = Checked(page.read_text())
    assert not checked.open
    assert checked.seen.count("svg") == 4
    assert "A <run>" in checked.words  # escaped
    assert "<dot & general>" in checked.words
    assert "http" not in page.read_text().replace(V5E.chip.source, "")  # nothing is loaded


def test_the_terminal_names_what_matters():
    console = Console(width=200, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    plan_report.show(plan_predict.report(answered(), V5E, "c.py"), console)
    text = console.export_text()
    for words in (
        "fits: 8.25 GiB of 15.75 GiB",
        "11 ms",
        "50.0%",
        "all-reduce",
        "stages_0/blocks_0",
        "88% of the peak",
    ):
        assert words in text, words


def test_reports_of_a_search_are_ordered_by_speed_among_what_fits():
    fast = plan_predict.report(answered(), V5E, "c.py")
    slow = json.loads(json.dumps(fast))
    slow["time"]["examples_per_second"] /= 2
    refused = {"refused": "RESOURCE_EXHAUSTED", "needed": 20 * GIB, "available": 15.75 * GIB}
    large = plan_predict.report(answered(train=refused), V5E, "c.py")
    failed = {"error": "no", "mesh": {}}
    assert plan_search.best([failed, large, slow, fast]) == [fast, slow, large, failed]


# The command ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([DIGITS, "--topology", "v5e-256"], "did you mean v5e:16x16?"),
        ([DIGITS, "--topology", "v5e:2x2", "--mesh", "data=3"], "mesh data=3, fsdp=1, sequence=1, tensor=1 must"),
        ([DIGITS, "--topology", "v5e:2x2", "--mesh", "rows=4"], "the axes are data, fsdp, sequence, tensor"),
        ([DIGITS, "--topology", "v5e:2x2", "--mesh", "data=0"], "must give data a positive size"),
        ([DIGITS, "--topology", "v5e:2x2", "--batch-per-chip", "0"], "--batch-per-chip 0 must be at least 1"),
        (["configs/nothing.py", "--topology", "v5e:2x2"], "there is no config file configs/nothing.py"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_anything_starts(monkeypatch, capsys, arguments, words):
    monkeypatch.setattr(plan.subprocess, "run", None)
    assert plan.main(arguments) == 2
    assert words in capsys.readouterr().err


def test_without_libtpu_the_command_counts_and_names_the_command_that_installs_it(tmp_path, capsys):
    code = plan.main([DIGITS, "--smoke", "--topology", "v5e:2x2", "--python", str(tmp_path / "none"), "--json"])
    printed = capsys.readouterr()
    report = json.loads(printed.out)["plan"]
    assert code == 0
    assert plan.MAKE in printed.err
    assert not report["compiled"]
    assert report["memory"]["kinds"]["parameters"] == 4 * report["parameters"]


def test_a_process_that_dies_costs_one_answer_only(tmp_path):
    # An interpreter that answers the first job and dies at the second.
    fake = tmp_path / "python"
    fake.write_text(
        f"#!{sys.executable}\nimport json, sys\nfor line in open(sys.argv[3]):\n    job = json.loads(line)\n"
        "    if job['config'] == 'bad': sys.exit('it died')\n"
        "    open(sys.argv[4], 'a').write(json.dumps(job) + '\\n')\n"
    )
    fake.chmod(0o755)

    jobs = [plan_compile.Job(name, "v5e:2x2") for name in ("one", "bad", "two")]
    found = list(plan.run_jobs(jobs, str(fake)))
    assert [each.get("config") for each in found] == ["one", None, "two"]
    assert "it died" in found[1]["error"]


# With libtpu ----------------------------------------------------------------------------------------------------------


def for_tpu(function, shapes, topology="v5e:2x2", split=False):
    """Return the reading of a function compiled for a slice, its arguments whole or split along their first axis."""
    pytest.importorskip("libtpu")
    assert "TPU_WORKER_HOSTNAMES" in os.environ, "run `make test-tpu-all`: libtpu needs its environment"
    from tools.plan_read import reading

    place = chips.topology(topology)
    devices = plan_compile.devices_of(place)
    mesh = meshes.build(plan_compile.resolved(plan_compile.Job(DIGITS, topology, smoke=True)).mesh, devices)
    where = meshes.batch_sharding(mesh) if split else meshes.replicated(mesh)
    compiled = jax.jit(function, in_shardings=where, out_shardings=where).lower(*shapes).compile()
    return reading(compiled.as_text() or "", mesh, clock=place.chip.clock, ring=place.ring), place


@pytest.mark.tpu
@pytest.mark.parametrize("topology", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_estimated_products_reach_the_published_peak_almost(topology):
    shape = jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16)
    found, place = for_tpu(lambda a, b: a @ b, (shape, shape), topology)
    assert found.by_kind["product"] == found.cycles
    assert 0.75 < 2 * 4096**3 / place.peak * place.chip.clock / found.cycles <= 1


@pytest.mark.tpu
def test_a_config_is_compiled_and_its_figures_are_those_of_its_shapes():
    pytest.importorskip("libtpu")
    job = plan_compile.Job(DIGITS, "v5e:2x2", smoke=True, mesh={"data": 4}, evaluation=True)
    (answer,) = plan_compile.answers([job])
    report = plan_predict.report(answer, V5E, DIGITS)
    assert report["compiled"]
    assert report["by_libtpu"]
    # A data-parallel step reduces its gradients and a few scalars, and sends nothing else. The compiler may reduce the
    # gradient of a position bias before it is summed into its small table.
    (sent,) = report["collectives"]
    assert (sent["kind"], sent["axes"]) == ("all-reduce", ("data",))
    assert 0 <= sent["bytes"] - 4 * report["parameters"] <= 1024
    assert report["memory"]["available"] == 15.75 * GIB
    assert report["memory"]["fits"]
    assert report["evaluation"]["step"] < report["time"]["step"]
    assert any(each["module"].startswith("stages_0") for each in report["heaviest"])


@pytest.mark.tpu
def test_a_program_that_is_too_large_is_refused_with_figures():
    pytest.importorskip("libtpu")
    calibrated = plan_compile.calibration(plan_compile.devices_of(V5E)[0], size=1024)
    assert calibrated["available"] == 15.75 * GIB
    with pytest.raises(ValueError, match=r"must be a slice that libtpu knows.*known are"):
        plan_compile.devices_of(chips.topology("v5e:3x3"))
