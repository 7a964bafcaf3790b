"""Equivariant, hierarchical-window and Hopfield layers in Flax, each with its claim proved by a test."""

from importlib.metadata import PackageNotFoundError, version

from jaxlayers.models import abstract_inputs as abstract_inputs
from jaxlayers.models import create_model as create_model
from jaxlayers.models import list_models as list_models
from jaxlayers.pretrained import load_pretrained as load_pretrained
from jaxlayers.summary import summarize as summarize

try:
    __version__ = version("jaxlayers")
except PackageNotFoundError:  # imported from a source tree that was never installed
    __version__ = "0+unknown"

__all__ = ["__version__", "abstract_inputs", "create_model", "list_models", "load_pretrained", "summarize"]
