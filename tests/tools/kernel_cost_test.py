"""What kernels cost is read from the schedules of the compiler, and both programs are weighed by it."""

import sys

import pytest

from tools import kernel_cost
from tools.kernel_cost import Half, Size, half_row, row


def test_a_row_counts_the_kernels_beside_what_xla_compiles():
    found = {"jnp": 3000, "pallas": 900, "kernels": 600}
    assert row(Size(56, 96, 3, shifted=True), found) == "| 56 x 56 x 96 | 3 | 7 (shifted) | 3,000 | 900 | 600 | 2.00 |"
    # Were the kernels left out, it would be 3.33.
    assert row(Size(64, 96, 3, window=8), {**found, "kernels": 2100}).endswith("| 8 | 3,000 | 900 | 2,100 | 1.00 |")

    assert half_row(Half(56, 96), found) == "| 56 x 56 x 96 | 3,000 | 900 | 600 | 2.00 |"


def test_a_compiler_that_fails_is_told():
    with pytest.raises(RuntimeError, match=r"compiling Size\(.*for no-chip failed"):
        kernel_cost.measured(Size(4, 8, 1, window=4), "no-chip", sys.executable)


@pytest.mark.tpu
def test_the_kernels_are_estimated_to_win_where_the_table_takes_them():
    found = kernel_cost.measured(Size(28, 96, 3, shifted=True), "v5e", sys.executable)
    assert found["kernels"] > 50_000
    assert found["jnp"] > 1.5 * (found["pallas"] + found["kernels"])


@pytest.mark.tpu
def test_the_kernels_of_the_second_half_are_estimated_to_win():
    found = kernel_cost.measured(Half(28, 96), "v5e", sys.executable)
    # Seven products of the tokens with a projection of 128 x 384 take that long at the peak.
    assert found["kernels"] > 7 * 8 * 28**2 * 128 * 384 / 2**16
    assert found["jnp"] > 1.5 * (found["pallas"] + found["kernels"])
