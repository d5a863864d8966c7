"""Tests of k2train/checkpoint."""
