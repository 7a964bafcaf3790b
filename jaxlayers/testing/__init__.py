"""Floor 3: symmetry assertions and the conformance suite, for the library's layers and for users' own functions."""

from jaxlayers.geometry.groups import Cyclic as Cyclic
from jaxlayers.geometry.groups import Dihedral as Dihedral
from jaxlayers.geometry.groups import Euclidean as Euclidean
from jaxlayers.geometry.groups import GeneralLinear as GeneralLinear
from jaxlayers.geometry.groups import Group as Group
from jaxlayers.geometry.groups import Orthogonal as Orthogonal
from jaxlayers.geometry.groups import Product as Product
from jaxlayers.geometry.groups import Rotation as Rotation
from jaxlayers.geometry.groups import Scale as Scale
from jaxlayers.geometry.groups import SpecialEuclidean as SpecialEuclidean
from jaxlayers.geometry.groups import SpecialLinear as SpecialLinear
from jaxlayers.geometry.groups import Symmetric as Symmetric
from jaxlayers.geometry.groups import Translation as Translation
from jaxlayers.geometry.images import disk_mask as disk_mask
from jaxlayers.testing.conformance import BadInput as BadInput
from jaxlayers.testing.conformance import Case as Case
from jaxlayers.testing.symmetry import EquivarianceCurve as EquivarianceCurve
from jaxlayers.testing.symmetry import IdleCheckError as IdleCheckError
from jaxlayers.testing.symmetry import Symmetry as Symmetry
from jaxlayers.testing.symmetry import assert_equivariant as assert_equivariant
from jaxlayers.testing.symmetry import assert_invariant as assert_invariant
from jaxlayers.testing.symmetry import equivariance_error as equivariance_error
from jaxlayers.testing.symmetry import sample_elements as sample_elements
