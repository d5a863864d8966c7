"""Loads the emulated CUDA libraries when it is imported: the first module of a fork server."""

from tests.emulated_cuda.libraries import load

load()
