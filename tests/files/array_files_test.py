"""NumPy's and Flax's files: read as they were written, refused where they are forged."""

import struct
import zipfile

import flax.serialization
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxlayers.files import open_tensors
from jaxlayers.files.array_files import read_msgpack, read_npz

ARRAYS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "turned": np.arange(6.0).reshape(2, 3).T,
    "number": np.asarray(3),
    "empty": np.zeros((0, 2), bool),
}


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_files_are_read(tmp_path, save):
    save(tmp_path / "x.npz", **ARRAYS)
    tensors = open_tensors(tmp_path / "x.npz")
    assert tensors.kind == "npz"
    assert set(tensors) == set(ARRAYS)
    for name, value in ARRAYS.items():
        assert tensors.stored[name].shape == value.shape
        assert tensors[name].dtype == value.dtype
        np.testing.assert_array_equal(tensors[name], value)


def test_npz_files_that_are_forged_are_refused(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, x=np.array([{"an": "object"}], dtype=object))
    with pytest.raises(ValueError, match="Python objects"):
        open_tensors(path)
    head = np.lib.format.magic(1, 0)

    def forge(description: bytes, content: bytes, **options) -> None:
        with zipfile.ZipFile(path, "w", **options) as archive:
            archive.writestr("x.npy", head + struct.pack("<H", len(description)) + description + content)

    text = b"{'descr': '<f4', 'fortran_order': False, 'shape': (%s,), }\n"
    forge(text % b"2", b"\0" * 8)
    assert open_tensors(path)["x"].shape == (2,)
    forge(text % b"3", b"\0" * 8)
    with pytest.raises(ValueError, match="announces 3 values"):
        open_tensors(path)
    forge(text % b"-1", b"")
    with pytest.raises(ValueError, match="has a shape"):
        open_tensors(path)
    forge(b"__import__('os').system('true')\n", b"")
    with pytest.raises(ValueError, match="has a header that is none"):
        open_tensors(path)
    # As much as the method can shrink zeros is believed, more is not.
    forge(text % b"1000000", b"\0" * 4_000_000, compression=zipfile.ZIP_DEFLATED)
    assert not open_tensors(path)["x"].any()
    forge(text % b"10000000", b"\0" * 40_000_000, compression=zipfile.ZIP_BZIP2)
    with pytest.raises(ValueError, match="grows from"):
        open_tensors(path)


TREE = {
    "params": {
        "dense": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3), "bias": np.ones(3, ml_dtypes.bfloat16)},
        **{f"layer_{index}": {"scale": np.full(2, index)} for index in range(20)},
    },
    "step": 7,
}


def test_msgpack_files_of_flax_are_read(tmp_path):
    path = tmp_path / "x.msgpack"
    path.write_bytes(flax.serialization.msgpack_serialize(TREE))
    tensors = open_tensors(path)
    assert tensors.kind == "msgpack"
    np.testing.assert_array_equal(tensors["params.dense.kernel"], TREE["params"]["dense"]["kernel"])
    assert tensors["params.dense.bias"].dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(tensors["params.layer_19.scale"], [19, 19])
    assert len(tensors) == 22
    path.write_bytes(flax.serialization.to_bytes({"x": jnp.ones((2, 2))}))
    np.testing.assert_array_equal(open_tensors(path)["x"], np.ones((2, 2)))


def test_arrays_that_flax_cuts_up_are_put_together(tmp_path, monkeypatch):
    monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", 64)
    path = tmp_path / "x.msgpack"
    whole = np.arange(60, dtype=np.float32).reshape(3, 20)
    path.write_bytes(flax.serialization.msgpack_serialize({"x": whole}))
    tensors = open_tensors(path)
    assert list(tensors) == ["x"]
    np.testing.assert_array_equal(tensors["x"], whole)


def test_forged_msgpack_files_are_refused(tmp_path):
    path = tmp_path / "x.msgpack"

    def refused(content: bytes, match: str) -> None:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=match):
            read_msgpack(path)

    whole = flax.serialization.msgpack_serialize({"x": np.ones(4, np.float32)})
    refused(whole[:-1], "announces bytes")
    refused(whole + b"\0", "after its end")
    refused(whole.replace(b"float32", b"object_"), "has a dtype 'object_'")
    refused(whole.replace(b"\x91\x04", b"\x91\x05"), "another number of bytes")
    refused(b"\x81" * 200 + b"\xc0", "no text or number|nests deeper")
    refused(b"\x91" * 200 + b"\xc0", "nests deeper")
    refused(b"\xdf\xff\xff\xff\xff" + b"\xa1x\xc0", "announces bytes|twice")
    refused(b"\xc1", "no msgpack file")
    refused(b"\x82\xa1x\xc0\xa1x\xc0", "or twice")


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 10**4), st.integers(0, 255)), min_size=1, max_size=6), st.booleans())
def test_damaged_files_are_refused_or_keep_their_shapes(tmp_path, changes, is_npz):
    path = tmp_path / ("x.npz" if is_npz else "x.msgpack")
    if is_npz:
        np.savez(path, **ARRAYS)
    else:
        path.write_bytes(flax.serialization.msgpack_serialize(TREE))
    damaged = bytearray(path.read_bytes())
    for place, value in changes:
        damaged[place % len(damaged)] = value
    path.write_bytes(damaged)
    try:
        tensors = (read_npz if is_npz else read_msgpack)(path)
        for name in tensors:
            assert tensors[name].shape == tensors.stored[name].shape
    except ValueError:
        pass
