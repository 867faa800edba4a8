"""Estimators of the ELBO and of other objectives, for any program.

- Pyro's estimators, with checks of the programs: `Trace_ELBO`, `TraceMeanField_ELBO`,
  `TraceGraph_ELBO`, `TraceEnum_ELBO`.
- Bounds of K draws: `IWAE`, `Renyi`, `MIWAE`, `CIWAE`, `PIWAE`, `TVO`, `CUBO`.
- Gradients of less variance, or without `rsample`: `STL`, `DReG`, `VIMCO`, `RWS`.
- Other objectives: `BetaELBO`, `FreeBits`, `TotalCorrelation`, `MMD`.

Numbers of draws are positional, all other arguments keywords: `IWAE(5)`, `CIWAE(5, beta=0.1)`. To
add an estimator, subclass `Estimator`, `MonteCarlo`, `MultiSample` or `Weighted`.
"""

from .aggregate import MMD as MMD
from .aggregate import TotalCorrelation as TotalCorrelation
from .beta import BetaELBO as BetaELBO
from .bounds import CIWAE as CIWAE
from .bounds import IWAE as IWAE
from .bounds import MIWAE as MIWAE
from .bounds import PIWAE as PIWAE
from .bounds import Renyi as Renyi
from .cubo import CUBO as CUBO
from .discrete import TraceEnum_ELBO as TraceEnum_ELBO
from .discrete import TraceGraph_ELBO as TraceGraph_ELBO
from .estimator import Estimate as Estimate
from .estimator import Estimator as Estimator
from .estimator import Objective as Objective
from .estimator import PerRow as PerRow
from .free_bits import FreeBits as FreeBits
from .gradients import RWS as RWS
from .gradients import STL as STL
from .gradients import VIMCO as VIMCO
from .gradients import DReG as DReG
from .mean_field import TraceMeanField_ELBO as TraceMeanField_ELBO
from .multi_sample import MonteCarlo as MonteCarlo
from .multi_sample import MultiSample as MultiSample
from .multi_sample import Weighted as Weighted
from .multi_sample import Weights as Weights
from .trace_elbo import Trace_ELBO as Trace_ELBO
from .tvo import TVO as TVO
