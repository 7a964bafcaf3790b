"""Kernels of a program are found, weighed once each by their schedules, and counted as often as they run."""

import json

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractMesh, PartitionSpec

from tools import chips, plan_compile, plan_kernels, plan_predict, plan_read
from tools.plan_kernels import Schedule, scheduled

V5E = chips.topology("v5e:2x2")
MESH = AbstractMesh((1,), ("data",))
ROWS = jax.ShapeDtypeStruct((32, 128), jnp.float32)


# Schedules ------------------------------------------------------------------------------------------------------------

# A kernel of a grid: two bundles before its loop and one after it; in a turn two, and a loop of four turns, each of a
# bundle and a loop of three turns of two bundles. The test of the outer of the two is in the inner one.
BUNDLES = """
= control target key start
LB: loop body
= control target key end

     0   :  { %s1_s0 = inlined_call_operand.hbm [shape: f32[32,128]] }
   0x1   :  { %s2_s1 = smov 0 /* copy for cssa */  ;;  %s3_s2 = smov 1 /* copy for cssa */ }
   0x2 LB: > { %s4_s1 = sphi %s2_s1, %s5_s1 /* phi copy :: iteration index, stage = 0 */ }
   0x3 LB: >> { %s6_s2 = sphi %s3_s2, %s7_s2 /* phi copy */  ;;  %s8_s3 = smov 0 }
   0x4 LB: >>> { %s9_s3 = sphi %s8_s3, %s10_s3 /* phi copy */  ;;  %s10_s3 = sadd.s32 2, %s9_s3
a line that goes on /* Start region 7 */ }
   0x5   : >>> { %p1_p1 = scmp.ge.s32.totalorder %s10_s3, 6 /* loop exit test */ /* Start region 8
      :: Start region 9 */  ;;  %s7_s2 = sadd.s32 (%p1_p1), 1, %s6_s2
      ;;  %p2_p2 = scmp.ge.s32.totalorder (%p1_p1), %s7_s2, 5 /* loop exit test */ }
   0x6   :  {}
   0x7 PF: > { %s5_s1 = sadd.s32 1, %s4_s1  ;;  %p3_p3 = scmp.ge.s32.totalorder %s5_s1, 9 /* loop exit test */ }
   0x8   :  { %23 = sbr.rel (!%p3_p3) target = $region262 }
"""


def test_bundles_count_times_the_turns_of_the_loops_around_them():
    # The grid's loop turns 9 times for 7 steps; what is in it runs 7 times.
    assert scheduled(BUNDLES, 7) == Schedule(2 + 7 * (2 + 4 * (1 + 3 * 2)) + 2)
    # Without a grid the first loop is one like the others, and turns 9 times.
    assert scheduled(BUNDLES, 1) == Schedule(2 + 9 * (2 + 4 * (1 + 3 * 2)) + 2)


def test_a_loop_whose_turns_are_not_known_counts_once_and_is_told():
    unknown = BUNDLES.replace(", 5 /* loop exit test */", ", %s99_s9 /* loop exit test */")
    assert scheduled(unknown, 7) == Schedule(2 + 7 * (2 + 1 + 3 * 2) + 2, unknown_loops=1)
    assert scheduled(BUNDLES, None) == Schedule(2 + 2 + 4 * (1 + 3 * 2) + 2, unknown_loops=1)
    with pytest.raises(ValueError, match="must have bundles"):
        scheduled("Schedule analysis:\n\ttotal scheduled bundles: 936\n", 7)


# Programs -------------------------------------------------------------------------------------------------------------


def times(x, factor=2.0, memory=None):
    """A kernel of four steps on TPU, and another on CPU."""

    def kernel(x, out):
        out[...] = factor * x[...]

    def run(rows=8, **keywords):
        block = pl.BlockSpec((rows, 128), lambda row: (row, 0))
        shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
        grid = (x.shape[0] // rows,)
        return pl.pallas_call(
            kernel, out_shape=shape, grid=grid, in_specs=[block], out_specs=block, name="times", **keywords
        )

    return jax.lax.platform_dependent(
        x, cpu=run(rows=4, interpret=True), tpu=run(compiler_params=pltpu.CompilerParams(vmem_limit_bytes=memory))
    )


def text_of(function, *shapes):
    """Return a function's program for TPU as HLO, before the compiler has it."""
    lowered = jax.jit(function).trace(*shapes).lower(lowering_platforms=("tpu",))
    return lowered.compiler_ir("hlo").get_hlo_module().to_string()


@pytest.fixture
def asked(monkeypatch):
    """Kernels that are compiled; a million bundles each."""
    found = []

    def compiled(kernels, place):
        found.extend(kernels)
        return [Schedule(1_000_000) for _ in kernels]

    monkeypatch.setattr(plan_kernels, "_compiled", compiled)
    monkeypatch.setattr(plan_kernels, "_KNOWN", {})
    return found


def kernel_cycles(function, *shapes):
    text, _ = plan_kernels.weighed(text_of(function, *shapes), V5E)
    return plan_read.reading(text, MESH).by_kind.get("kernel", 0)


def test_kernels_count_as_often_as_they_run_and_equal_ones_are_compiled_once(asked):
    def once_and_five_times(x):
        x = times(x)
        return jax.lax.scan(lambda x, _: (times(x) + 1, None), x, length=5)[0]

    assert kernel_cycles(once_and_five_times, ROWS) == 6_000_000
    (kernel,) = asked  # though the two are from different lines
    assert (kernel.name, kernel.steps) == ("times", 4)  # the TPU's, which has eight rows in a step
    assert (kernel.operands, kernel.results) == (("f32[32,128]",), ("f32[32,128]",))
    # What was compiled before is known; another factor or another shape is another kernel.
    assert kernel_cycles(times, ROWS) == 1_000_000
    assert len(asked) == 1
    assert kernel_cycles(lambda x: times(times(x, 3.0)), ROWS) == 2_000_000
    assert kernel_cycles(times, jax.ShapeDtypeStruct((64, 128), jnp.float32)) == 1_000_000
    assert [each.steps for each in asked] == [4, 4, 8]


def test_a_kernel_alone_has_the_fast_memory_that_it_asked_for(asked):
    kernel_cycles(lambda x: times(times(x, 3.0, memory=48 * 2**20)), ROWS)
    given = [json.loads(each.config) for each in asked]
    memory = [config["scoped_memory_configs"] for config in given if "scoped_memory_configs" in config]
    assert len(asked) == 2
    assert [int(each["size"]) for (each,) in memory] == [48 * 2**20]


def test_a_conditional_counts_its_dearest_branch_and_a_program_without_kernels_none(asked):
    def either(x):
        return jax.lax.cond(x[0, 0] > 0, times, lambda x: times(times(x)), x)

    assert kernel_cycles(either, ROWS) == 2_000_000
    asked.clear()
    text = text_of(lambda x: x @ x.T, ROWS)
    assert plan_kernels.weighed(text, V5E) == (text, [])
    assert not asked


def test_bytes_to_and_from_memory_are_a_floor(monkeypatch, asked):
    monkeypatch.setattr(plan_kernels, "_compiled", lambda kernels, place: [Schedule(1)] * len(kernels))
    moved = 2 * 4 * 32 * 128
    assert kernel_cycles(times, ROWS) == round(moved / V5E.bandwidth * V5E.chip.clock) > 1
    # What lies in vector memory is not moved.
    text = text_of(times, ROWS).replace("f32[32,128]{1,0}", "f32[32,128]{1,0:T(8,128)S(1)}")
    assert '"estimated_cycles":"1"' in plan_kernels.weighed(text, V5E)[0]


def test_a_kernel_that_is_not_compiled_is_told_and_has_no_cycles(monkeypatch, asked):
    monkeypatch.setattr(plan_kernels, "_compiled", lambda kernels, place: [Schedule(error="no")] * len(kernels))
    text, (row,) = plan_kernels.weighed(text_of(times, ROWS), V5E)
    assert plan_read.reading(text, MESH).opaque == 1
    assert (row["name"], row["steps"], row["error"]) == ("times", 4, "no")


def test_a_compiler_that_dies_leaves_its_words(monkeypatch):
    monkeypatch.setattr(plan_kernels, "_KNOWN", {})
    monkeypatch.setattr(plan_kernels.sys, "executable", "/bin/false")
    _, (row,) = plan_kernels.weighed(text_of(times, ROWS), V5E)
    assert "ended with 1" in row["error"]


def test_kernels_of_the_compiler_itself_are_text_of_many_dialects():
    body = b"""module {
      func.func @soft(%arg0: i32, %arg1: memref<8x4xf32, #tpu.memory_space<vmem>>) attributes {
          dimension_semantics = [#tpu.dimension_semantics<parallel>], iteration_bounds = array<i64: 6>} {
        %zero = arith.constant 0 : i32
        %first = arith.cmpi eq, %zero, %arg0 : i32
        scf.if %first { }
        return
      }
    }"""
    program = plan_kernels.mosaic(body)
    kernel = plan_kernels.Kernel(program, (), (), "{}")
    assert kernel.name == "soft"
    assert kernel.steps == 6


@pytest.mark.parametrize(
    ("spelt", "dtype", "shape"),
    [
        ("bf16[8,49,96]", "bfloat16", (8, 49, 96)),
        ("pred[3]", "bool", (3,)),
        ("s32[]", "int32", ()),
        ("u8[4]", "uint8", (4,)),
        ("f8e4m3fn[2,2]", "float8_e4m3fn", (2, 2)),
    ],
)
def test_arrays_are_read_as_they_are_spelt(spelt, dtype, shape):
    found = plan_kernels._shape(spelt)
    assert (found.dtype.name, found.shape) == (dtype, shape)


# With libtpu ----------------------------------------------------------------------------------------------------------


@pytest.mark.tpu
def test_loops_of_a_real_schedule_are_counted():
    def loop(turns):
        def kernel(x, out):
            out[...] = jax.lax.fori_loop(2, 2 + turns, lambda _, x: jnp.tanh(x), x[...])

        block = pl.BlockSpec((8, 128), lambda row: (row, 0))
        return pl.pallas_call(kernel, out_shape=ROWS, grid=(4,), in_specs=[block], out_specs=block, name=f"loop{turns}")

    few, many = (plan_kernels.reading(loop(turns), ROWS, place=V5E).by_kernel[f"loop{turns}"] for turns in (100, 1000))
    assert 8 < many / few < 10


@pytest.mark.tpu
def test_a_kernel_under_a_mesh_is_that_of_one_device():
    pytest.importorskip("libtpu")
    mesh = jax.sharding.Mesh(plan_compile.devices_of(V5E), ("data",))
    split = jax.shard_map(
        times, mesh=mesh, in_specs=PartitionSpec("data"), out_specs=PartitionSpec("data"), check_vma=False
    )
    rows = jax.ShapeDtypeStruct((256, 128), jnp.float32)
    _, (row,) = plan_kernels.weighed(jax.jit(split).lower(rows).compile().as_text() or "", V5E)
    assert (row["steps"], row["error"], row["unknown_loops"]) == (256 // 4 // 8, "", 0)


@pytest.mark.tpu
def test_a_step_of_swin_has_cycles_of_kernels_where_they_are_chosen():
    pytest.importorskip("libtpu")

    def report(kernels):
        fields = ("model.depths=(2,)", "model.num_heads=(3,)", f"kernels={kernels}")
        job = plan_compile.Job("swin_tiny", "v5e:1x1", overrides=fields, batch_size=2, calibrate=False)
        (answer,) = plan_compile.answers([job])
        return plan_predict.report(answer, chips.topology("v5e:1x1"), "swin_tiny")

    plain, chosen = report("jnp"), report("table")
    assert "kernel" not in plain["cycles"]["by_kind"]
    assert set(chosen["cycles"]["by_kernel"]) == {
        "cut_windows", "join_windows", "project_and_norm", "project_and_norm_backward", "residual_feed_forward",
        "residual_feed_forward_backward", "window_block", "window_block_backward",
    }  # fmt: skip
    assert chosen["cycles"]["by_kind"]["kernel"] == sum(chosen["cycles"]["by_kernel"].values()) > 0
    assert not any("count as nothing" in line for line in chosen["assumptions"])
    assert chosen["time"]["step"] < plain["time"]["step"]
