"""Networks: tensors in, tensors out. They know no distribution, and infer their sizes."""

from .convolution import Convolution as Convolution
from .convolution import Deconvolution as Deconvolution
from .mlp import MLP as MLP
