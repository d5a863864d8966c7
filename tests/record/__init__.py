"""Tests of k2train/record."""
