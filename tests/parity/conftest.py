"""The reference packages; a parity test is skipped where one of them is not installed."""

import pytest


@pytest.fixture(scope="session", autouse=True)
def torchvision():
    """Import torchvision, which timm needs, also where its compiled operators are built for another torch."""
    torch = pytest.importorskip("torch")
    try:
        return pytest.importorskip("torchvision")
    except RuntimeError:
        # Its Python half registers shapes for operators that then do not exist; the models compared use none of them.
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        module = pytest.importorskip("torchvision")
        module.operators = library  # the definitions end with it
        return module


@pytest.fixture(scope="session")
def timm(torchvision):
    return pytest.importorskip("timm")


@pytest.fixture(scope="session")
def transformers():
    return pytest.importorskip("transformers")
