"""Associative memories: modern Hopfield networks and what is built of them."""

from jaxlayers.hopfield.energy_transformer import EnergyAttention as EnergyAttention
from jaxlayers.hopfield.energy_transformer import EnergyLayerNorm as EnergyLayerNorm
from jaxlayers.hopfield.energy_transformer import EnergyTransformerBlock as EnergyTransformerBlock
from jaxlayers.hopfield.hopfield import Hopfield as Hopfield
from jaxlayers.hopfield.hopfield import HopfieldBagClassifier as HopfieldBagClassifier
from jaxlayers.hopfield.hopfield import HopfieldClassifier as HopfieldClassifier
from jaxlayers.hopfield.hopfield import HopfieldLayer as HopfieldLayer
from jaxlayers.hopfield.hopfield import HopfieldPooling as HopfieldPooling
from jaxlayers.hopfield.streaming import Streaming as Streaming
