"""Data: rows read from any container, named data sets, files, and argument validation."""
