"""A conversion holds little more than the model."""

import math

import pytest

from jaxlayers import create_model, pretrained
from tools import bench_convert


def test_the_synthetic_model_has_the_size_asked_for():
    for gigabytes in (0.02, 1.0):
        name, fields = bench_convert.wide(gigabytes)
        model = create_model(name, **fields)
        layout = pretrained.layout_of(model, pretrained.find_dialect(None, model, "timm"))
        count = sum(math.prod(shape) for shape in layout.values())
        assert abs(4 * count / 1e9 - gigabytes) < 0.15 * gigabytes


@pytest.mark.slow
def test_a_gigabyte_is_converted_within_its_size_and_a_third(capsys):
    assert bench_convert.main([]) == 0
    ratio = float(capsys.readouterr().out.split(": ")[-1].split()[0])
    assert 1.0 < ratio < 1.3
