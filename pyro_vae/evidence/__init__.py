"""log p(x) of a program, and how far the estimate can be trusted."""

from .bidirectional import bidirectional as bidirectional
from .evidence import Evidence as Evidence
from .linear_gaussian import linear_gaussian as linear_gaussian
from .log_evidence import log_evidence as log_evidence
from .pareto_k import good_k as good_k
from .pareto_k import pareto_k as pareto_k
