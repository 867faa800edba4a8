"""Predictions of any program: embeddings of rows, reconstructions of rows, and new rows."""

from .embed import embed as embed
from .reconstruct import reconstruct as reconstruct
from .sample import sample as sample
