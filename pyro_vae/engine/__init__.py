"""Traces steps to graphs, simplifies, compiles and captures them; and steps optimisers."""
