"""Associative memories: modern Hopfield networks and what is built of them."""

from jaxlayers.hopfield.deeprc import DeepRC as DeepRC
from jaxlayers.hopfield.deeprc import SequenceEmbedding as SequenceEmbedding
from jaxlayers.hopfield.energy_transformer import EnergyAttention as EnergyAttention
from jaxlayers.hopfield.energy_transformer import EnergyLayerNorm as EnergyLayerNorm
from jaxlayers.hopfield.energy_transformer import EnergyTransformerBlock as EnergyTransformerBlock
from jaxlayers.hopfield.hopfield import Hopfield as Hopfield
from jaxlayers.hopfield.hopfield import HopfieldBagClassifier as HopfieldBagClassifier
from jaxlayers.hopfield.hopfield import HopfieldClassifier as HopfieldClassifier
from jaxlayers.hopfield.hopfield import HopfieldLayer as HopfieldLayer
from jaxlayers.hopfield.hopfield import HopfieldPooling as HopfieldPooling
from jaxlayers.hopfield.hopular import Hopular as Hopular
from jaxlayers.hopfield.hopular import HopularBlock as HopularBlock
from jaxlayers.hopfield.hopular import HopularEmbedding as HopularEmbedding
from jaxlayers.hopfield.hopular import HopularSummary as HopularSummary
from jaxlayers.hopfield.hopular import hopular_lookup as hopular_lookup
from jaxlayers.hopfield.streaming import Streaming as Streaming
from jaxlayers.hopfield.tabular import CategoricalColumn as CategoricalColumn
from jaxlayers.hopfield.tabular import ContinuousColumn as ContinuousColumn
from jaxlayers.hopfield.tabular import TableSchema as TableSchema
