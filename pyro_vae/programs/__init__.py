"""Programs: a Pyro model and a guide in one module; how they are built, run and saved."""

from .program import Program as Program
from .saving import load as load
from .saving import save as save
from .vae import VAE as VAE
