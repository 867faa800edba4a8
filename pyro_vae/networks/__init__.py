"""Networks: tensors in, tensors out. They know no distribution, and infer their sizes."""

from .convolution import Convolution as Convolution
from .deconvolution import Deconvolution as Deconvolution
from .mlp import MLP as MLP
from .network import Network as Network
