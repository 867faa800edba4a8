"""Objectives: Pyro's estimators of the ELBO with their numbers kept on the device."""

from .estimator import Estimate as Estimate
from .estimator import Estimator as Estimator
from .estimator import Objective as Objective
from .trace_elbo import Trace_ELBO as Trace_ELBO
