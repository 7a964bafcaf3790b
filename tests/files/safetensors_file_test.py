"""Safetensors files: read as the safetensors package writes them, and refused where their header lies."""

import hashlib
import json
import os
import struct
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from jaxlayers.files import open_tensors
from jaxlayers.files.opening import contained
from jaxlayers.files.tensors import DTYPES

HONEST = {"w": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}


def write(path: Path, header, data: bytes = b"\0" * 24, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def test_what_the_package_writes_is_read(tmp_path):
    arrays = {
        "float": np.arange(6, dtype=np.float32).reshape(2, 3),
        "half": np.arange(4).astype(ml_dtypes.bfloat16),
        "mask": np.array([True, False]),
        "number": np.asarray(7),
        "empty": np.zeros((0, 3), np.float16),
    }
    save_file(arrays, str(tmp_path / "x.safetensors"), metadata={"format": "pt"})
    tensors = open_tensors(tmp_path / "x.safetensors")
    assert set(tensors) == set(arrays)
    assert tensors.metadata == {"format": "pt"}
    for name, value in arrays.items():
        assert tensors[name].dtype == value.dtype
        np.testing.assert_array_equal(tensors[name], value)
    assert tensors.nbytes == sum(value.nbytes for value in arrays.values())


@pytest.mark.parametrize("name", sorted(DTYPES))
def test_every_dtype_has_its_size(tmp_path, name):
    size = DTYPES[name].itemsize
    path = write(
        tmp_path / "x.safetensors",
        {"w": {"dtype": name, "shape": [3], "data_offsets": [0, 3 * size]}},
        b"\0" * 3 * size,
    )
    assert open_tensors(path)["w"].dtype == DTYPES[name]


def test_a_flipped_bit_is_found_where_a_digest_stands(tmp_path):
    data = np.arange(6, dtype=np.float32).tobytes()
    digest = json.dumps({"w": hashlib.sha256(data).hexdigest()})
    header = {"__metadata__": {"sha256": digest}, **HONEST}
    assert open_tensors(write(tmp_path / "x.safetensors", header, data))["w"][1, 2] == 5
    damaged = bytes([data[0] ^ 1, *data[1:]])
    with pytest.raises(ValueError, match="'w' .* does not match its SHA-256"):
        open_tensors(write(tmp_path / "x.safetensors", header, damaged))["w"]
    # Without a digest nothing can tell.
    assert open_tensors(write(tmp_path / "x.safetensors", HONEST, damaged))["w"].shape == (2, 3)


def entry(**changes):
    return {"w": {**HONEST["w"], **changes}}


@pytest.mark.parametrize(
    ("header", "match"),
    [
        (entry(data_offsets=[0, 20]), "has 20 bytes for F32"),
        (entry(data_offsets=[4, 28]), "begins at byte 4"),
        (entry(data_offsets=[24, 0]), "has -24 bytes"),
        (entry(data_offsets=[0.0, 24]), "must be two numbers"),
        (entry(shape=[2, -3]), "has a shape"),
        (entry(shape=[2**62, 4]), "has a shape"),
        (entry(shape="23"), "has a shape"),
        (entry(shape=[True, 6]), "has a shape"),
        (entry(dtype="F31"), "has dtype 'F31'"),
        (entry(note="x"), "must have a dtype, a shape and data_offsets alone"),
        ({**HONEST, "v": HONEST["w"]}, "tensors must lie one after the other"),
        ({}, "has 24 bytes of data for tensors of 0"),
        ({**HONEST, "__metadata__": {"x": 1}}, "metadata"),
        ({**HONEST, "__metadata__": {"sha256": "[]"}}, "sha256 metadata"),
        ([1, 2], "no JSON object"),
        (b'{"w": ', "no JSON"),
        (b"\xff\xfe{}", "no JSON"),
        (b'{"w": 1, "w": 2}', "stands twice"),
        (b"[" * 100_000, "no JSON"),
    ],
)
def test_headers_that_lie_are_refused(tmp_path, header, match):
    with pytest.raises(ValueError, match=match):
        open_tensors(write(tmp_path / "x.safetensors", header))


@pytest.mark.parametrize("length", [0, 1, 10**9, 2**63])
def test_absurd_header_lengths_are_refused(tmp_path, length):
    with pytest.raises(ValueError, match="announces a header"):
        open_tensors(write(tmp_path / "x.safetensors", HONEST, length=length))


def test_cut_files_are_refused(tmp_path):
    path = write(tmp_path / "x.safetensors", HONEST, b"\0" * 23)
    with pytest.raises(ValueError, match="cut off"):
        open_tensors(path)
    path.write_bytes(path.read_bytes()[:5])
    with pytest.raises(ValueError, match="announces a header"):
        open_tensors(path)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255)), min_size=1, max_size=6))
def test_damaged_files_are_refused_or_keep_their_bounds(tmp_path, changes):
    damaged = bytearray(write(tmp_path / "x.safetensors", HONEST).read_bytes())
    for place, value in changes:
        damaged[place % len(damaged)] = value
    (tmp_path / "x.safetensors").write_bytes(damaged)
    try:
        tensors = open_tensors(tmp_path / "x.safetensors")
        sizes = [tensors[name].nbytes for name in tensors]
    except ValueError:
        return
    assert sum(sizes) == 24


# Folders --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "a/b", "..", ".", "", "a\\b", "a\0b"])
def test_an_index_that_leads_out_of_its_folder_is_refused(tmp_path, name):
    (tmp_path / "inside").mkdir()
    write(tmp_path / "x.safetensors", HONEST)
    index = tmp_path / "inside" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(ValueError, match="must be a plain name"):
        open_tensors(tmp_path / "inside")


def test_links_out_of_a_folder_are_refused_but_in_the_hubs_cache(tmp_path):
    outside = write(tmp_path / "secret.safetensors", HONEST)
    folder = tmp_path / "folder"
    folder.mkdir()
    os.symlink(outside, folder / "model.safetensors")
    with pytest.raises(ValueError, match="outside its folder"):
        open_tensors(folder)
    snapshot, blobs = tmp_path / "hub" / "snapshots" / "abc", tmp_path / "hub" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    write(blobs / "123", HONEST)
    os.symlink("../../blobs/123", snapshot / "model.safetensors")
    assert list(open_tensors(snapshot)) == ["w"]
    assert contained(snapshot, "model.safetensors").name == "model.safetensors"


def test_indexes_that_do_not_fit_their_files_are_refused(tmp_path):
    write(tmp_path / "a.safetensors", HONEST)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"v": "a.safetensors"}}))
    with pytest.raises(ValueError, match="holds 'v', which it does not"):
        open_tensors(tmp_path)
    two = {"a": {**HONEST["w"], "data_offsets": [0, 24]}, "w": {**HONEST["w"], "data_offsets": [24, 48]}}
    write(tmp_path / "a.safetensors", two, b"\0" * 48)
    index.write_text(json.dumps({"weight_map": {"w": "a.safetensors"}}))
    with pytest.raises(ValueError, match=r"does not list \['a'\]"):
        open_tensors(tmp_path)
    index.write_text(json.dumps({"weight_map": [1]}))
    with pytest.raises(ValueError, match="must name a file"):
        open_tensors(index)
    index.write_text("[")
    with pytest.raises(ValueError, match="must be an index"):
        open_tensors(index)
    index.unlink()
    with pytest.raises(ValueError, match="must hold one of"):
        open_tensors(tmp_path)
    with pytest.raises(ValueError, match="does not exist"):
        open_tensors(tmp_path / "nothing")


def test_names_that_fall_together_are_refused(tmp_path):
    save_file({"a.w": np.ones(1), "b.w": np.ones(1)}, str(tmp_path / "x.safetensors"))
    tensors = open_tensors(tmp_path / "x.safetensors")
    assert list(tensors.rename(lambda name: name[2:] if name.startswith("a") else None)) == ["w"]
    with pytest.raises(ValueError, match="would be called 'w'"):
        tensors.rename(lambda name: name[2:])
