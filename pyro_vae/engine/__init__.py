"""The engine room: steps traced to graphs, simplified, compiled and captured; optimisers."""
