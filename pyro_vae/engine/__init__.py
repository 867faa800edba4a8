"""Engines: traces steps to graphs that are simplified, compiled or captured; optimiser steps."""
