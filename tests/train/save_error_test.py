"""A save that fails says which step, costs no other, and leaves a checkpointer that still works."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# A limit on the size of a file makes the operating system refuse a write in the middle, as a full disk does.
FULL_DISK = """
import os, resource, sys
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np
from train.checkpoint import Checkpointer, SaveError
directory = Path(sys.argv[1])
_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
def limit(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
def state(step, size):
    values = np.random.default_rng(step).standard_normal((8, size))
    return {str(row): jnp.asarray(row_values, jnp.float32) for row, row_values in enumerate(values)}
def same(restored, size):
    return all((restored.state[name] == leaf).all() for name, leaf in state(restored.step, size).items())
def attempt(size, note, limited):
    with Checkpointer(directory / str(limited) / str(size)) as checkpointer:
        checkpointer.save(1, state(1, size), data={"note": ""})
        checkpointer.wait()
        limit(limited)
        try:
            checkpointer.save(2, state(2, size), data={"note": note})
            checkpointer.wait()
            print("no error")
        except SaveError as error:
            print(error.step, "step 2 in" in str(error), type(error.__cause__).__name__ != "NoneType")
        print(sorted(os.listdir(checkpointer.directory)))
        limit(hard)
        restored = checkpointer.restore(state(0, size))
        print(restored.step, same(restored, size), checkpointer.skipped)
        print(checkpointer.save(2, state(2, size), data={"note": note}))
        restored = checkpointer.restore(state(0, size))
        print(restored.step, same(restored, size), checkpointer.steps())
attempt(1 << 17, "", 1 << 18)  # too little room for the arrays
attempt(16, "x" * 400_000, 1 << 18)  # too little for the manifest
"""


def test_room_for_neither_arrays_nor_manifest_loses_nothing(tmp_path: Path) -> None:
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    once = ["2 True True", "['1']", "1 True []", "True", "2 True [2, 1]"]
    assert done.stdout.splitlines() == [*once, *once], done.stderr


ONE_OF_TWO_FAILS = """
import sys
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np
rank, port, directory = int(sys.argv[2]), sys.argv[3], Path(sys.argv[1])
jax.distributed.initialize("127.0.0.1:" + port, num_processes=2, process_id=rank)
from train.checkpoint import Checkpointer, SaveError
whole = jax.sharding.NamedSharding(jax.make_mesh((2,), ("data",)), jax.sharding.PartitionSpec("data"))
make = jax.jit(lambda: {"x": jnp.arange(64.0)}, out_shardings=whole)
with Checkpointer(directory) as checkpointer:
    checkpointer.save(1, make(), data={})
    checkpointer.wait()
    finish = checkpointer._orbax.wait_until_finished
    def fail():
        finish()
        raise OSError("quota exceeded")
    checkpointer.save(2, make(), data={})
    if rank == 1:
        checkpointer._orbax.wait_until_finished = fail
    try:
        checkpointer.wait()
        print("no error")
    except SaveError as error:
        print(error.step, str(error).split("(")[1].split(")")[0])
    checkpointer._orbax.wait_until_finished = finish
    checkpointer.save(3, make(), data={})
    checkpointer.wait()
    print(checkpointer.steps()[0])
"""


@pytest.mark.slow
def test_the_failure_of_one_process_is_raised_on_both(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", ONE_OF_TWO_FAILS, str(tmp_path), str(rank), port],
            env=environment,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        results = [process.communicate(timeout=90) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for rank, (output, errors) in enumerate(results):
        lines = [line for line in output.splitlines() if not line.startswith("[Gloo]")]
        reason = "OSError: quota exceeded" if rank == 1 else "process 1 cannot go on"
        assert lines == [f"2 {reason}", "3"], errors
