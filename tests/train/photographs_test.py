"""Photographs: what they are, which crops are drawn, and that no scene is on both sides."""

import numpy as np
import pytest

from tests.train.sources_test import assert_whole
from train.photographs import PHOTOGRAPHS, photograph, photographs


def test_photographs_are_coloured_read_only_and_on_one_side_only() -> None:
    assert not set(PHOTOGRAPHS["train"]) & set(PHOTOGRAPHS["test"])
    for names in PHOTOGRAPHS.values():
        for name in names:
            picture = photograph(name)
            assert picture.ndim == 3
            assert picture.shape[-1] == 3
            assert picture.dtype == np.uint8
            assert min(picture.shape[:2]) >= 300
            assert np.std(picture) > 10
            with pytest.raises(ValueError, match="read-only"):
                picture[0, 0, 0] = 0


def test_a_grid_of_crops_puts_the_picture_together() -> None:
    source = photographs("test", 100)
    crops = [source[index]["image"] for index in range(25)]
    joined = np.concatenate([np.concatenate(crops[5 * row : 5 * row + 5], 1) for row in range(5)])
    np.testing.assert_array_equal(np.round(joined * 255), photograph("astronaut")[:500, :500])
    assert len(source) == 25 + 3 * 4 + 25


def test_drawn_crops_lie_in_every_picture_and_depend_on_the_seed() -> None:
    source = photographs("train", 64, count=400)
    assert {name for name, _, _ in source.corners} == set(PHOTOGRAPHS["train"])
    assert {source[index]["image"].shape for index in range(400)} == {(64, 64, 3)}
    assert photographs("train", 64, count=400).corners == source.corners
    assert photographs("train", 64, count=400, seed=1).corners != source.corners
    name, row, column = source.corners[7]
    expected = photograph(name)[row : row + 64, column : column + 64] / np.float32(255)
    np.testing.assert_array_equal(source[7]["image"], expected)


def test_crops_are_a_source() -> None:
    assert_whole(photographs("test", 32, count=20))
    assert photographs("test", 32, count=20).digest() != photographs("test", 32, count=20, seed=1).digest()


def test_what_is_not_there_is_named() -> None:
    with pytest.raises(ValueError, match="must be 'train' or 'test'"):
        photographs("validation", 32)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="size=301 must be from 1 to 300"):
        photographs("train", 301)
    with pytest.raises(ValueError, match="count=0 must be at least 1"):
        photographs("train", 32, count=0)
    with pytest.raises(ValueError, match="'lena' must be one of"):
        photograph("lena")
