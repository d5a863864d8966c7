"""Tests of k2train/optim."""
