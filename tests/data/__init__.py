"""Tests of k2train/data."""
