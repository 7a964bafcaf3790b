"""What is read from a program's text, on short programs written by hand whose figures can be counted."""

import pytest
from jax.sharding import AbstractMesh

from tools import plan_read
from tools.plan_read import array_bytes, place, reading

MESH = AbstractMesh((4, 2), ("data", "tensor"))


def cost(cycles, **more):
    rest = "".join(f', "{name}": {value}' for name, value in more.items())
    return f'backend_config={{"window_config":{{"estimated_cycles":"{cycles}"}}{rest}}}'


def name(text):
    return f'metadata={{op_name="jit(step)/{text}"}}'


# One product forwards, one backwards, a copy; the first's result is kept for the second. Small arrays, whole tiles.
PROGRAM = f"""HloModule jit_step, is_scheduled=true

%dots (a: f32[8,128], b: f32[128,128]) -> f32[8,128] {{
  %a = f32[8,128]{{1,0:T(8,128)}} parameter(0)
  %b = f32[128,128]{{1,0:T(8,128)}} parameter(1)
  ROOT %dot = f32[8,128]{{1,0:T(8,128)}} convolution(%a, %b), dim_labels=bf_io->bf, {name("jvp(Net)/up/dot_general")}
}}

%sum (p: f32[], q: f32[]) -> f32[] {{
  %p = f32[] parameter(0)
  %q = f32[] parameter(1)
  ROOT %add = f32[] add(%p, %q)
}}

ENTRY %main (x: f32[8,128], w: f32[128,128]) -> f32[8,128] {{
  %x = f32[8,128]{{1,0:T(8,128)}} parameter(0)
  %w = f32[128,128]{{1,0:T(8,128)}} parameter(1)
  %f = f32[8,128]{{1,0:T(8,128)}} fusion(%x, %w), kind=kOutput, calls=%dots, {cost(1000)}
  %c = f32[8,128]{{1,0:T(8,128)}} copy(%f), {name("jvp(Net)/norm/transpose")}, {cost(300)}
  %g = f32[8,128]{{1,0:T(8,128)}} fusion(%c, %w), kind=kOutput, calls=%dots, \
{name("transpose(jvp(Net))/up/dot_general")}, {cost(2000)}
  %h = f32[8,128]{{1,0:T(8,128)}} add(%g, %f), {name("transpose(jvp(Net))/up/add")}, {cost(200)}
  ROOT %r = f32[8,128]{{1,0:T(8,128)}} all-reduce(%h), replica_groups={{{{0,2,4,6}},{{1,3,5,7}}}}, to_apply=%sum
}}
"""
ARRAY = 4 * 8 * 128
WEIGHT = 4 * 128 * 128


def test_cycles_are_summed_by_kind_module_and_direction():
    found = reading(PROGRAM, MESH)
    assert found.cycles == 3500
    assert found.by_kind == {"product": 3000, "copy": 300, "other": 200}
    assert found.by_module == {("up", False): 1000, ("norm", False): 300, ("up", True): 2200}
    assert [(heavy.name, heavy.module, heavy.backward, heavy.what) for heavy in found.heaviest[:2]] == [
        ("g", "up", True, "dot_general"),
        ("f", "up", False, "dot_general"),
    ]
    assert len(reading(PROGRAM, MESH, keep=1).heaviest) == 1


def test_bytes_are_those_of_operands_and_results_in_hbm():
    # f and g: x or c, the weight and a result; the copy and the all-reduce two arrays; the sum three.
    assert reading(PROGRAM, MESH).bytes == 2 * (2 * ARRAY + WEIGHT) + 2 * ARRAY + 3 * ARRAY + 2 * ARRAY
    # What lies in vector memory is not read from HBM: here the result of f, which three instructions touch.
    inside = PROGRAM.replace("%f = f32[8,128]{1,0:T(8,128)}", "%f = f32[8,128]{1,0:T(8,128)S(1)}")
    assert reading(PROGRAM, MESH).bytes - reading(inside, MESH).bytes == 3 * ARRAY


def test_activations_are_what_the_gradient_reads_of_the_forward_pass():
    # At g: f and c, made forwards and read backwards, and g itself.
    assert reading(PROGRAM, MESH).live == {"activations": 2 * ARRAY, "temporaries": ARRAY}
    # Negative control: where nothing is a gradient nothing is kept for one.
    forwards = PROGRAM.replace("transpose(jvp(Net))", "jvp(Net)")
    assert reading(forwards, MESH).live == {"activations": 0, "temporaries": 3 * ARRAY}


def test_collectives_have_axes_bytes_and_the_time_of_a_ring():
    (sent,) = reading(PROGRAM, MESH, clock=1e9, ring=lambda size: 1e9 * size).sent
    assert (sent.kind, sent.axes, sent.bytes, sent.count, sent.group_size) == ("all-reduce", ("data",), ARRAY, 1, 4)
    assert sent.seconds == pytest.approx(2 * 3 / 4 * ARRAY / 4e9)
    found = reading(PROGRAM, MESH, clock=1e9, ring=lambda size: 1e9 * size)
    assert found.exposed == pytest.approx(sent.seconds)  # it is not asynchronous


def looped(turns=5, known=True, bound="%n", body=""):
    config = cost(0, known_trip_count=f'{{"n":"{turns}"}}') if known else cost(0)
    return f"""HloModule jit_step

%body (s: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {{
  %s = (s32[], f32[8,128]{{1,0}}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %v = f32[8,128]{{1,0}} get-tuple-element(%s), index=1
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %twice = f32[8,128]{{1,0}} add(%v, %v), {name("jvp(Net)/while/body/layer/add")}, {cost(10)}
  ROOT %out = (s32[], f32[8,128]{{1,0}}) tuple(%next, %twice)
}}

%cond (t: (s32[], f32[8,128])) -> pred[] {{
  %t = (s32[], f32[8,128]{{1,0}}) parameter(0)
  %j = s32[] get-tuple-element(%t), index=0
  %n = s32[] constant({turns})
  ROOT %less = pred[] compare(%j, {bound}), direction=LT
}}

ENTRY %main (x: f32[8,128]) -> (s32[], f32[8,128]) {{
  %x = f32[8,128]{{1,0}} parameter(0)
  %zero = s32[] constant(0)
  %start = (s32[], f32[8,128]{{1,0}}) tuple(%zero, %x)
  ROOT %loop = (s32[], f32[8,128]{{1,0}}) while(%start), condition=%cond, body=%body, {config}
}}
"""


@pytest.mark.parametrize("known", [True, False], ids=["said", "counted"])
def test_loops_count_times_their_turns(known):
    found = reading(looped(7, known=known), MESH)
    assert (found.cycles, found.unknown_loops) == (70, 0)
    assert found.by_module == {("layer", False): 70}
    (heavy,) = found.heaviest
    assert heavy.count == 7
    assert found.bytes == 7 * 3 * ARRAY + 7 * 3 * 4  # the counter is added to in memory too


def test_a_loop_of_unknown_length_counts_once_and_is_told():
    found = reading(looped(7, known=False, bound="%j"), MESH)
    assert (found.cycles, found.unknown_loops) == (10, 1)


def test_slices_of_stacked_arrays_count_as_what_is_read_and_written():
    stacked = f"""HloModule m

%fused (p: f32[9,8,128], i: s32[]) -> f32[1,8,128] {{
  %p = f32[9,8,128]{{2,1,0}} parameter(0)
  %i = s32[] parameter(1)
  ROOT %s = f32[1,8,128]{{2,1,0}} dynamic-slice(%p, %i, %i, %i), dynamic_slice_sizes={{1,8,128}}
}}

%write (p: f32[9,8,128], u: f32[1,8,128], i: s32[]) -> f32[9,8,128] {{
  %q = f32[9,8,128]{{2,1,0}} parameter(0)
  %u = f32[1,8,128]{{2,1,0}} parameter(1)
  %k = s32[] parameter(2)
  ROOT %d = f32[9,8,128]{{2,1,0}} dynamic-update-slice(%q, %u, %k, %k, %k)
}}

ENTRY %main (x: f32[9,8,128], i: s32[]) -> f32[9,8,128] {{
  %x = f32[9,8,128]{{2,1,0}} parameter(0)
  %n = s32[] parameter(1)
  %one = f32[1,8,128]{{2,1,0}} fusion(%x, %n), kind=kLoop, calls=%fused, {cost(1)}
  ROOT %all = f32[9,8,128]{{2,1,0}} fusion(%x, %one, %n), kind=kLoop, calls=%write, {cost(1)}
}}
"""
    assert reading(stacked, MESH).bytes == (ARRAY + 4 + ARRAY) + (0 + ARRAY + 4 + ARRAY)


def test_a_conditional_counts_its_dearest_branch():
    text = f"""HloModule m

%cheap (p: f32[8]) -> f32[8] {{
  %p = f32[8]{{0}} parameter(0)
  ROOT %a = f32[8]{{0}} add(%p, %p), {cost(5)}
}}

%dear (q: f32[8]) -> f32[8] {{
  %q = f32[8]{{0}} parameter(0)
  ROOT %b = f32[8]{{0}} multiply(%q, %q), {cost(50)}
}}

ENTRY %main (i: s32[], x: f32[8]) -> f32[8] {{
  %i = s32[] parameter(0)
  %x = f32[8]{{0}} parameter(1)
  ROOT %c = f32[8]{{0}} conditional(%i, %x, %x), branch_computations={{%cheap, %dear}}
}}
"""
    assert reading(text, MESH).cycles == 50


def overlapped(between):
    shape = "f32[8,128]{1,0}"
    return f"""HloModule m

%sum (p: f32[], q: f32[]) -> f32[] {{
  %p = f32[] parameter(0)
  %q = f32[] parameter(1)
  ROOT %add = f32[] add(%p, %q)
}}

ENTRY %main (x: f32[8,128]) -> f32[8,128] {{
  %x = {shape} parameter(0)
  %s = {shape} all-reduce-start(%x), replica_groups={{{{0,1}},{{2,3}},{{4,5}},{{6,7}}}}, to_apply=%sum
  %y = {shape} add(%x, %x), {cost(between)}
  %d = {shape} all-reduce-done(%s)
  ROOT %r = {shape} add(%d, %y), {cost(1)}
}}
"""


@pytest.mark.parametrize(("between", "exposed"), [(0, 4096), (1000, 3096), (9999, 0)])
def test_asynchronous_collectives_hide_behind_what_is_scheduled_meanwhile(between, exposed):
    # A ring of two reduces 4,096 bytes at a byte a nanosecond, and a cycle takes one.
    found = reading(overlapped(between), MESH, clock=1e9, ring=lambda size: 1e9)
    (sent,) = found.sent
    assert sent.axes == ("tensor",)
    assert sent.seconds == pytest.approx(4096e-9)
    assert found.exposed == pytest.approx(exposed * 1e-9)


@pytest.mark.parametrize(
    ("spelt", "expected"),
    [
        ("f32[]", 4),
        ("pred[3]{0}", 3),
        ("bf16[49,96]{1,0:T(8,128)(2,1)}", 2 * 56 * 128),
        ("bf16[49,96]{0,1:T(8,128)(2,1)}", 2 * 128 * 96),
        ("f32[5,3,7]{2,1,0:T(8,128)}", 4 * 5 * 8 * 128),
        ("f32[100]{0:T(128)}", 4 * 128),
        ("(f32[8,128]{1,0:T(8,128)S(1)}, s32[])", 4 * 8 * 128 + 4),
    ],
)
def test_bytes_of_an_array_count_whole_tiles(spelt, expected):
    assert array_bytes(spelt) == expected


def test_bytes_can_be_those_of_one_memory():
    spelt = "(f32[8,128]{1,0:T(8,128)S(1)}, f32[4]{0})"
    assert (array_bytes(spelt, memory=0), array_bytes(spelt, memory=1)) == (16, 4096)


@pytest.mark.parametrize(
    ("op_name", "expected"),
    [
        (
            "jit(step)/transpose(jvp(Swin))/Swin.features/Swin.stage_maps/stages_0/blocks_1/up/dot_general",
            ("stages_0/blocks_1/up", True, "dot_general"),
        ),
        ("jit(step)/jvp(Swin)/head/add", ("head", False, "add")),
        ("jit(step)/jvp(Net)/while/body/closed_call/layer/norm/mul", ("layer/norm", False, "mul")),
        ("jit(step)/jit(_beta)/jit(_gamma)/vmap()/while/body/add", ("", False, "add")),
        ("jit(step)/sub", ("", False, "sub")),
        ("", ("", False, "")),
    ],
)
def test_names_of_operations_give_the_layer_and_the_direction(op_name, expected):
    assert place(op_name) == expected


def test_a_refusal_for_memory_gives_both_figures():
    used = "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory. Used 20.50G of 15.75G hbm."
    assert plan_read.out_of_memory(used) == {"needed": 20.5 * 2**30, "available": 15.75 * 2**30}
    temporaries = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (40.00G) exceeds "
        "available HBM (15.75G)."
    )
    assert plan_read.out_of_memory(temporaries) == {"temporaries": 40 * 2**30, "available": 15.75 * 2**30}
    assert plan_read.out_of_memory("INVALID_ARGUMENT: no such thing") is None


def test_what_is_no_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY computation"):
        reading("HloModule nothing", MESH)


def test_kernels_are_a_kind_of_their_own_and_opaque_without_cycles():
    def with_kernel(cycles=""):
        line = (
            f'  %cut_windows.3 = f32[8,128]{{1,0}} custom-call(%x), custom_call_target="tpu_custom_call", '
            f'{name("jvp(Net)/up/cond/branch_0_fun/cut_windows/pallas_call")}, backend_config={{{cycles}"body":""}}\n'
        )
        return reading(PROGRAM.replace("  %c = ", line + "  %c = ", 1), MESH)

    none = with_kernel()
    assert (none.opaque, none.by_kernel, none.cycles) == (1, {}, 3500)
    found = with_kernel('"estimated_cycles":"7000",')
    assert (found.opaque, found.by_kernel, found.cycles) == (0, {"cut_windows": 7000}, 10500)
    assert found.by_kind == {"product": 3000, "copy": 300, "other": 200, "kernel": 7000}
    # A kernel is no module, and what is shown of it is its name.
    assert found.by_module[("up", False)] == 8000
    assert (found.heaviest[0].kind, found.heaviest[0].module, found.heaviest[0].what) == ("kernel", "up", "cut_windows")
    assert reading(PROGRAM, MESH).opaque == 0
