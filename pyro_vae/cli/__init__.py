"""The command line: `pyro-vae demo`, `fit DATA`, `evaluate RUN DATA`, `sample RUN`, ..."""

from . import results as results
from .commands import app as app
from .commands import main as main
from .members import member as member
