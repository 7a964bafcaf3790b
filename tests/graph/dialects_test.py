"""The references' names and layouts of the graph models, there and back: random tensors, and those of the references.

The references' tensors are those of the golden files, whose own tests say how they were made.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlayers.graph.dagnn import DAGNN
from jaxlayers.graph.sheaf_diffusion import MAPS, SheafDiffusion
from tests.reference_files import check_file, shaped, stored
from tests.round_trip import check_dialect

ENDS = jax.ShapeDtypeStruct((40,), jnp.int32)
GRAPH = (*shaped((12, 7)), ENDS, ENDS)


def test_dagnn_there_and_back():
    model = DAGNN(num_classes=4, features=9, depth=12)
    check_dialect(model, "official", inputs=GRAPH)
    check_file(stored("dagnn", "weights/"), model, "official", inputs=GRAPH)


@pytest.mark.parametrize("kind", [*MAPS, "once"])
def test_sheaf_diffusion_there_and_back(kind):
    once = {"maps": "diagonal", "left_weights": False, "learn_every_step": False}
    model = SheafDiffusion(4, features=4, stalk_size=3, depth=3, **(once if kind == "once" else {"maps": kind}))

    def without_diagonals(name, tensor):
        """Triangles of Cayley maps have no diagonal here."""
        if kind != "cayley" or "learners" not in name:
            return tensor
        rows, columns = np.tril_indices(model.stalk_size)
        return np.where((rows == columns)[:, None], 0, tensor)

    check_file(
        stored("sheaf_diffusion", f"{kind}/weights/"), model, "official", inputs=GRAPH, written=without_diagonals
    )
    if kind != "cayley":
        check_dialect(model, "official", inputs=GRAPH)
