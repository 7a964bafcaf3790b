"""What kernels of edges cost is read from the schedules of the compiler, loops counted by their turns."""

import sys

import pytest

from tools import edge_kernel_cost
from tools.edge_kernel_cost import Size, row, scheduled

# Two bundles, a grid of eight whose bundle 0x3 .. 0x6 is a loop of five turns, with a bundle of what follows in it.
BUNDLES = """= control target key start
LB: loop body

     0   :  { %s1_s0 = smov 0 }
   0x1   :  {}
   0x2 LB: > { %s2_s1 = sadd.s32 1, %s3_s2 }
   0x3 LB: >> { %s4_s3 = sphi %s5_s4, %s6_s5 /* phi copy */ }
   0x4   : >> { %p12_p3 = scmp.ge.s32.totalorder %s6_s5, 5 /* loop exit test */  ;;  %v1_v0 = vld [%s9] }
   0x5   : > { %v7_v1 = vadd.f32 %v1_v0, %v1_v0  ;;  %14 = sbr.rel (!%p12_p3) target = $region7 }
   0x6   : >> { %v8_v2 = vmov %v7_v1 }
   0x7   : > { %p15_p4 = scmp.ge.s32.totalorder %s2_s1, 66 /* loop exit test */ }
   0x8 PF: > { %16 = sbr.rel (!%p15_p4) target = $region9 }
"""


def test_bundles_of_a_loop_count_by_its_turns():
    assert scheduled(BUNDLES) == 5 + 5 * 4
    # The turns of the grid are not counted, those of the loop are.
    assert scheduled(BUNDLES.replace(", 66 /*", ", 99 /*")) == 25
    assert scheduled(BUNDLES.replace(", 5 /*", ", 7 /*")) == 5 + 7 * 4


def test_a_text_that_cannot_be_counted_is_refused():
    with pytest.raises(ValueError, match="must be lines that begin with an address"):
        scheduled("total scheduled bundles: 9\n")
    with pytest.raises(ValueError, match="and their loops end"):
        scheduled(BUNDLES.replace("loop exit test", "a test"))


def test_a_row_counts_the_kernels_of_edges_beside_what_xla_compiles():
    found = {"jnp": 3000, "pallas": 900, "kernels": 600, "jnp_memory": 94 * 2**20, "pallas_memory": 2**19}
    assert row(Size(512, 16, 20, 1), found) == (
        "| convolution | 512 x 16 | 20 | 0 to 1 | 3,000 | 900 | 600 | 2.00 | 94.0 MiB | 0.5 MiB |"
    )
    # Were the kernels left out, it would be 3.33.
    assert "| attention, bottleneck 4 |" in row(Size(512, 16, 20, 1, bottleneck=4), found)
    assert "| 1.00 |" in row(Size(512, 16, 20, 1), {**found, "kernels": 2100})


def test_a_compiler_that_fails_on_edges_is_told():
    with pytest.raises(RuntimeError, match=r"compiling Size\(.*for no-chip failed"):
        edge_kernel_cost.measured(Size(4, 2, 1, 0), "no-chip", sys.executable)


@pytest.mark.tpu
def test_the_kernels_of_edges_are_estimated_to_win_where_the_table_takes_them():
    found = edge_kernel_cost.measured(Size(128, 16, 20, 1), "v5e", sys.executable)
    assert found["kernels"] > 50_000
    assert found["jnp"] > 1.5 * (found["pallas"] + found["kernels"])
    assert found["jnp_memory"] > 4 * found["pallas_memory"]
