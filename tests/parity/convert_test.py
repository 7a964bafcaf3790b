"""Models of timm, torchvision, transformers and MONAI through the whole conversion command, and back."""

import pytest

from tools import convert_table


@pytest.mark.parametrize("row", convert_table.ROWS, ids=lambda row: f"{row.model}-{row.package}")
def test_there_and_back_through_the_command(row, torchvision, tmp_path):
    pytest.importorskip(row.package)
    outcome = convert_table.run(row, tmp_path)
    print(outcome)
    assert outcome.relative < 1e-4
    assert outcome.back
