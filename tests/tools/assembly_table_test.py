"""The simulated fragments are what they are said to be, the rivals work where they should, and the table is written."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.spatial import cKDTree

from configs import se3_assembly_fragments as task
from jaxlayers.equivariant.se3_assembly import Poses, place, rotation_angle
from tools import assembly_table


def test_fragments_go_back_to_a_jug_and_the_same_seed_gives_the_same():
    source, again = (task.Fragments(3, seed=4) for _ in range(2))
    for index in range(3):
        record = source[index]
        for name, value in again[index].items():
            np.testing.assert_array_equal(record[name], value)
        for turn in record["rotation"]:
            np.testing.assert_allclose(turn @ turn.T, np.eye(3), atol=1e-6)
            assert np.linalg.det(turn) == pytest.approx(1, abs=1e-5)
        np.testing.assert_allclose(record["parts"].mean(axis=1), 0, atol=1e-6)
        batch = {name: value[None] for name, value in record.items()}
        back = np.asarray(place(jnp.asarray(batch["parts"]), task.truth(batch)))[0]
        # The surface that the record was made of: nothing is drawn between jugs and cuts.
        rng = np.random.RandomState([4, index])
        while True:
            surface = task.jug(rng, task.DENSE)
            pieces = task.broken(surface, rng)
            if len(pieces[1]) >= task.SMALLEST * len(surface):
                break
        for piece, points in zip(pieces, back, strict=True):
            assert cKDTree(piece).query(points)[0].max() < 6 * task.NOISE
        assert len(pieces[0]) >= len(pieces[1])
    assert np.abs(task.Fragments(3, seed=5)[0]["parts"] - source[0]["parts"]).max() > 0.1


def test_jugs_have_a_mirror_plane_and_no_other_symmetry():
    surface = task.jug(np.random.RandomState(0), 6000, spread=0.0)
    distances = {
        name: np.quantile(cKDTree(surface).query(surface * signs)[0], 0.99)
        for name, signs in {"z": [1, 1, -1], "x": [-1, 1, 1], "y": [1, -1, 1], "turned": [-1, 1, -1]}.items()
    }
    assert distances["z"] < 0.1
    assert min(distances["x"], distances["y"], distances["turned"]) > 0.2
    # Proportions vary, unless they are told not to.
    heights = [np.ptp(task.jug(np.random.RandomState(seed), 500)[:, 1]) for seed in range(8)]
    assert np.ptp(heights) > 0.2


def test_fragments_turned_anew_keep_their_place():
    record = task.Fragments(1, seed=2)[0]
    turned = task.turned(record, np.random.default_rng(0))
    assert np.abs(turned["parts"] - record["parts"]).max() > 0.1
    back = [np.einsum("pij,pnj->pni", one["rotation"], one["parts"]) for one in (record, turned)]
    np.testing.assert_allclose(*back, atol=1e-5)


def test_errors_are_those_of_the_poses():
    batch = task.batch_of(task.Fragments(2, seed=3), 2)
    right = task.truth(batch)
    exact = task.measure(batch, right)
    assert float(jnp.max(exact["rotation_degrees"])) < 0.1
    assert float(jnp.max(exact["chamfer"])) < 1e-6
    np.testing.assert_array_equal(exact["part_accuracy"], 1)
    # The whole assembly moved: no relative error.
    turn = jnp.asarray(task._turn(np.array([1.0, 0.3, 0.2, 0.1])), jnp.float32)
    moved = Poses(turn @ right.rotations, right.translations @ turn.T + 0.5, right.centroids)
    found = task.measure(batch, moved)
    assert float(jnp.max(found["rotation_degrees"])) < 0.1
    assert float(jnp.max(found["translation"])) < 1e-4
    assert float(jnp.min(found["absolute_degrees"])) > 20
    # The second fragment alone: 30 degrees.
    angle = np.radians(15)
    off = jnp.asarray(task._turn(np.array([np.cos(angle), 0, np.sin(angle), 0])), jnp.float32)
    wrong = Poses(right.rotations.at[:, 1].set(off @ right.rotations[:, 1]), right.translations, right.centroids)
    found = task.measure(batch, wrong)
    np.testing.assert_allclose(found["rotation_degrees"], 30, atol=0.1)
    np.testing.assert_allclose(found["absolute_degrees"], 15, atol=0.1)


def test_closest_points_pose_what_is_whole_and_not_what_is_broken():
    record = task.Fragments(1, seed=3)[0]
    template = task.jug(np.random.RandomState(1), task.POINTS * 3, spread=0.0)[: 2 * task.POINTS]
    turns = np.stack([task._turn(np.random.RandomState(seed).normal(size=4)) for seed in range(4)])
    whole = {
        "parts": np.stack([template @ turn for turn in turns])[None].astype(np.float32),
        "rotation": turns[None].astype(np.float32),
        "translation": np.broadcast_to(template.mean(axis=0), (1, 4, 3)).astype(np.float32),
    }
    found = task.onto_template(whole)
    off = jnp.rad2deg(rotation_angle(found.rotations, jnp.asarray(whole["rotation"])))
    # Of four it poses three; one stops at a place that fits almost as well.
    assert int(jnp.sum(off < 5)) >= 3
    np.testing.assert_allclose(found.translations, whole["translation"], atol=0.05)
    broken = {name: value[None] for name, value in record.items()}
    # Laid on each other instead of beside each other.
    assert float(task.measure(broken, task.onto_each_other(broken))["translation"][0]) > 0.3
    assert len(task.turns_of_cube()) == 24


def test_table_measures_all_methods_and_writes_its_page(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(task, "POINTS", 16)
    monkeypatch.setattr(task, "turns_of_cube", lambda: (np.eye(3),))
    common = ["--out", str(tmp_path / "out"), "--docs", str(tmp_path / "docs")]
    table = assembly_table.main(["--steps", "3", "--jugs", "3", "--smoke", *common])
    found = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert set(found["scores"]) == {*task.BASELINES, assembly_table.OURS, "PointNet"}
    assert table in (tmp_path / "docs" / "assembly.md").read_text()
    assert (tmp_path / "docs" / "images" / "assembly.png").stat().st_size > 5000
    assert assembly_table.main(["--steps", "0", *common]) == table
    assert "processor time" in capsys.readouterr().err
