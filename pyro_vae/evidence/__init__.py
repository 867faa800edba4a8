"""log p(x) of a program, and how far the estimate can be trusted."""

from .exact import linear_gaussian as linear_gaussian
from .importance_sampling import log_evidence as log_evidence
from .importance_sampling import summary as summary
from .pareto import good_k as good_k
from .pareto import pareto_k as pareto_k
