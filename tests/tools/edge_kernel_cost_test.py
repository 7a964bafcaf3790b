"""What kernels of edges cost is told beside what XLA compiles."""

import sys

import pytest

from tools import edge_kernel_cost
from tools.edge_kernel_cost import Size, row


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
