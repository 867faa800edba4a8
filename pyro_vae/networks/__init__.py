"""Networks: modules from tensors to tensors, which infer the sizes of their layers."""

from .convolution import Convolution as Convolution
from .deconvolution import Deconvolution as Deconvolution
from .mlp import MLP as MLP
from .network import Network as Network
