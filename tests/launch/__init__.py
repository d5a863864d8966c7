"""Tests of k2train/launch."""
