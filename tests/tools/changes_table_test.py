"""The pairs of scans are what they are said to be, and the page says what was measured."""

import numpy as np
import pytest
from scipy import ndimage

from configs import swin_unetr_changes as task
from tools import changes_table

HALF = task.SIZE[0] // 2


def across(x):
    """Return what is at the same place of the other scan."""
    return np.concatenate([x[HALF:], x[:HALF]])


def test_volumes_are_seeded_and_a_changed_spot_is_in_one_scan_alone():
    one, again, other = (task.volumes(12, seed=seed) for seed in (0, 0, 1))
    alone, both = [], []
    for index in range(12):
        np.testing.assert_array_equal(one[index]["image"], again[index]["image"])
        assert not np.array_equal(one[index]["label"], other[index]["label"])
        image, label = one[index]["image"], one[index]["label"]
        assert image.shape == (*task.SIZE, 1)
        assert set(np.unique(label)) == {0, 1, 2}
        # The other scan has a lasting voxel of its own near every lasting one.
        spots = ndimage.binary_dilation(across(label) == 1, iterations=2)
        assert np.mean(spots[label == 1]) > 0.97
        both.append(across(image[..., 0])[label == 1].mean())
        alone.append(across(image[..., 0])[label == 2].mean())
    # Brightness at the same place of the other scan tells them apart; their own does not.
    assert np.mean(both) > np.mean(alone) + 0.15
    own = [np.mean([one[index]["image"][one[index]["label"] == kind].mean() for index in range(12)]) for kind in (1, 2)]
    assert abs(own[0] - own[1]) < 0.04


def test_comparing_helps_thresholds():
    found = task.baselines()
    assert 0.45 < found["all lasting mean_dice"] < 0.65
    assert found["compared by thresholds mean_dice"] > found["all lasting mean_dice"] + 0.15


def test_verdict_compares_seeds():
    said = changes_table.verdict({"a": [0.5, 0.7], "b": [0.2, 0.3], "c": [0.1, 0.8]})
    assert "a is 0.150 above the best of the others, c" in said
    assert "worst seed has 0.500, the best seed of any other 0.800" in said
    assert "a is 0.100 below" in changes_table.verdict({"a": [0.5], "b": [0.6]})
    assert changes_table.spread({"a": [0.5, 0.25]}).endswith("| a | 0.500 | 0.250 |")


@pytest.mark.slow
def test_page_is_written_from_runs(tmp_path):
    page = changes_table.main(["--smoke", "--run", str(tmp_path / "run"), "--docs", str(tmp_path), "--seeds", "2"])
    assert (tmp_path / "changes.md").read_text() == page
    assert (tmp_path / "images" / "changes.png").exists()
    assert page.count("| U-Net |") == 2
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"seed_0", "seed_1"}
