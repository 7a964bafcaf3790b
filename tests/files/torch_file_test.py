"""PyTorch files: read as they were written, and nothing in them is ever run.

`golden/torch_zip.pt` and `golden/torch_legacy.pt` were written by torch.save of PyTorch 2.13.0 from the object that
`expected` describes, the second with `_use_new_zipfile_serialization=False`.
"""

import pickle
import shutil
import struct
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxlayers.files import open_tensors
from jaxlayers.files.torch_file import read_torch

GOLDEN = Path(__file__).parents[1] / "golden"
FILES = ("torch_zip.pt", "torch_legacy.pt")


def expected():
    base = np.arange(24, dtype=np.float32).reshape(4, 6)
    half = np.arange(6).astype(ml_dtypes.bfloat16)
    return {
        "model.weight": base,
        "model.turned": base.T,
        "model.part": base[1:3, ::2],
        "model.half": half,
        "model.number": np.asarray(7),
        "model.mask": np.array([True, False]),
        "model.parameter": np.ones(2, np.float32),
        "model.empty": np.zeros((0, 3), np.float32),
        "optimizer.state.0.step": np.asarray(2, np.float32),
        "nested.0.a": half[2:4],
    }


@pytest.mark.parametrize("name", FILES)
def test_every_tensor_is_read_as_it_was_written(name):
    tensors = open_tensors(GOLDEN / name)
    assert dict(tensors.metadata) == {"epoch": "3", "name": "tiny"}
    assert set(tensors) == set(expected())
    for key, value in expected().items():
        assert tensors[key].dtype == value.dtype
        np.testing.assert_array_equal(tensors[key], value)
        assert not tensors[key].flags.writeable or not tensors[key].size


def test_kinds_are_told_apart():
    assert [open_tensors(GOLDEN / name).kind for name in FILES] == ["torch", "torch (before 1.6)"]


# Forged files ---------------------------------------------------------------------------------------------------------


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def tuple_of(*parts: bytes) -> bytes:
    return b"(" + b"".join(parts) + b"t"


def number(value: int) -> bytes:
    return b"I%d\n" % value


def tensor(shape=(2, 3), strides=(3, 1), offset=0, key="0", count=6, kind="FloatStorage") -> bytes:
    """A tensor in the instructions of a pickle, as torch.save writes it, true or forged."""
    storage = tuple_of(text("storage"), b"ctorch\n" + kind.encode() + b"\n", text(key), text("cpu"), number(count))
    arguments = (
        storage + b"Q",
        number(offset),
        tuple_of(*map(number, shape)),
        tuple_of(*map(number, strides)),
        b"\x89",
        b"ccollections\nOrderedDict\n)R",
    )
    return b"ctorch._utils\n_rebuild_tensor_v2\n" + tuple_of(*arguments) + b"R"


def program(**values: bytes) -> bytes:
    return b"\x80\x02}(" + b"".join(text(name) + value for name, value in values.items()) + b"u."


def write(path: Path, pickled: bytes, data: bytes = b"\0" * 24, *, compress=False, **further: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/data/0", data)
        for name, content in further.items():
            archive.writestr(f"archive/{name.replace('__', '.')}", content)
    return path


def test_an_honest_hand_made_file_is_read(tmp_path):
    """The negative control of all that is refused below."""
    path = write(tmp_path / "x.pt", program(w=tensor()), np.arange(6, dtype=np.float32).tobytes(), byteorder=b"little")
    np.testing.assert_array_equal(read_torch(path)["w"], np.arange(6, dtype=np.float32).reshape(2, 3))


class Trap:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def test_what_a_pickle_would_call_is_refused_by_name_and_not_called(tmp_path):
    mark = tmp_path / "mark"
    pickled = pickle.dumps({"w": Trap(mark)}, protocol=2)
    pickle.loads(pickled)
    assert mark.exists(), "the trap must work where it is unpickled"
    mark.unlink()
    for placeholders in (False, True):
        path = write(tmp_path / "x.pt", pickled)
        if not placeholders:
            with pytest.raises(ValueError, match=r"names '(builtins|__builtin__)\.getattr'"):
                read_torch(path)
        else:
            assert len(read_torch(path, placeholders=True)) == 0
        assert not mark.exists()


@pytest.mark.parametrize(
    "named", ["os\nsystem", "posix\nsystem", "builtins\neval", "torch\nload", "torch.hub\nload", "numpy\nload"]
)
@pytest.mark.parametrize("legacy", [False, True])
def test_any_other_name_is_refused(tmp_path, named, legacy):
    pickled = b"\x80\x02c" + named.encode() + b"\n" + tuple_of(text("true")) + b"R."
    if legacy:
        head = [pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
        path = tmp_path / "x.pt"
        path.write_bytes(b"".join(head) + pickled + pickle.dumps([], 2))
    else:
        path = write(tmp_path / "x.pt", pickled)
    with pytest.raises(ValueError, match=f"names '{named.replace(chr(10), '[.]')}'.*none of it was run"):
        read_torch(path)


@pytest.mark.parametrize(
    ("forged", "match"),
    [
        (tensor(shape=(2, 4), strides=(4, 1)), "reaches beyond the 6 values"),
        (tensor(offset=1), "reaches beyond"),
        (tensor(offset=-1), "reaches beyond"),
        (tensor(strides=(-3, 1)), "reaches beyond"),
        (tensor(shape=(10**6, 10**6), strides=(0, 0)), "reaches beyond"),
        (tensor(shape=(2**60, 1)), "has a shape"),
        (tensor(shape=(-1, 3)), "has a shape"),
        (tensor(strides=(3,)), "forged offset or strides"),
        (tensor(count=7), r"holds 24 bytes for 'archive/data/0', not the 28"),
        (tensor(count=10**15), "holds 24 bytes"),
        (tensor(key="../0"), "forged key"),
        (tensor(key="1"), "must hold the values 'archive/data/1'"),
        (tensor(kind="Tensor"), "names 'torch.Tensor'"),
        (b"N", "tuple index|damaged"),
    ],
)
def test_forged_tensors_are_refused(tmp_path, forged, match):
    pickled = program(w=forged) if forged != b"N" else b"\x80\x02}(\x85u."
    with pytest.raises(ValueError, match=match):
        read_torch(write(tmp_path / "x.pt", pickled))


def test_views_of_one_storage_may_repeat_it_a_little(tmp_path):
    path = write(
        tmp_path / "x.pt", program(w=tensor(shape=(5, 6), strides=(0, 1))), np.arange(6.0, dtype="f4").tobytes()
    )
    np.testing.assert_array_equal(read_torch(path)["w"], np.tile(np.arange(6.0), (5, 1)))


def test_archives_that_torch_does_not_write_are_refused(tmp_path):
    path, honest = tmp_path / "x.pt", program(w=tensor())
    with pytest.raises(ValueError, match="compressed"):
        read_torch(write(path, honest, b"\0" * 10**6, compress=True))
    with pytest.raises(ValueError, match="big-endian"):
        read_torch(write(path, honest, byteorder=b"big"))
    with pytest.raises(ValueError, match="TorchScript"):
        read_torch(write(path, honest, constants__pkl=b"x"))
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("archive/data/0", b"\0" * 24)
    with pytest.raises(ValueError, match="twice"):
        read_torch(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme", "no pickle")
    with pytest.raises(ValueError, match="must hold one data.pkl, not 0"):
        read_torch(path)
    path.write_bytes(b"no checkpoint at all")
    with pytest.raises(ValueError, match="no file of torch.save"):
        read_torch(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="is empty"):
        read_torch(path)
    with pytest.raises(ValueError, match="regular file"):
        read_torch(tmp_path)


def test_containers_that_hold_themselves_end(tmp_path):
    endless: list = []
    endless.append(endless)
    assert len(read_torch(write(tmp_path / "x.pt", pickle.dumps({"x": endless}, 2)))) == 0
    doubled: list = [1]
    for _ in range(60):
        doubled = [doubled, doubled]
    assert len(read_torch(write(tmp_path / "y.pt", pickle.dumps({"x": doubled}, 2)))) == 0


def test_two_lengths_for_one_storage_are_refused(tmp_path):
    forged = program(w=tensor(), v=tensor(count=3, shape=(3,), strides=(1,)))
    with pytest.raises(ValueError, match="two types or lengths"):
        read_torch(write(tmp_path / "x.pt", forged))


def test_placeholders_keep_the_tensors_beside_them(tmp_path):
    namespace = b"cargparse\nNamespace\n)\x81}" + text("lr") + b"K\x01sb"
    path = write(tmp_path / "x.pt", program(w=tensor(), options=namespace))
    with pytest.raises(ValueError, match="names 'argparse.Namespace'"):
        read_torch(path)
    assert list(read_torch(path, placeholders=True)) == ["w"]


@pytest.mark.parametrize("name", FILES)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_files_are_refused_or_read_within_their_bounds(tmp_path, name, data):
    whole = (GOLDEN / name).read_bytes()
    damaged = bytearray(whole[: data.draw(st.integers(0, len(whole)))])
    for place, value in data.draw(st.lists(st.tuples(st.integers(0, len(whole) - 1), st.integers(0, 255)), max_size=8)):
        if place < len(damaged):
            damaged[place] = value
    path = tmp_path / "damaged.pt"
    path.write_bytes(damaged)
    refusal = ""
    try:
        tensors = open_tensors(path)
        for key in tensors:
            assert tensors[key].shape == tensors.stored[key].shape
    except ValueError as error:
        refusal = str(error)
    assert not refusal or str(path) in refusal or "must be" in refusal


def test_a_checkpoint_in_parts_is_one(tmp_path):
    for index in range(2):
        write(tmp_path / f"part-{index}.bin", program(**{f"w{index}": tensor()}))
    (tmp_path / "pytorch_model.bin.index.json").write_text('{"weight_map": {"w0": "part-0.bin", "w1": "part-1.bin"}}')
    tensors = open_tensors(tmp_path)
    assert list(tensors) == ["w0", "w1"]
    assert tensors.kind == "torch"
    shutil.copy(tmp_path / "part-0.bin", tmp_path / "part-1.bin")
    with pytest.raises(ValueError, match="says that 'part-1.bin' holds 'w1'"):
        open_tensors(tmp_path)
