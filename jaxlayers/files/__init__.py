"""Tensors in files: read lazily, and without executing anything that a file may hold."""

from jaxlayers.files.opening import open_tensors as open_tensors
from jaxlayers.files.safetensors_file import write_safetensors as write_safetensors
from jaxlayers.files.tensors import Tensors as Tensors
