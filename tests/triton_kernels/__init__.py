"""Tests of k2train/triton_kernels."""
