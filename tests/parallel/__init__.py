"""Tests of k2train/parallel."""
