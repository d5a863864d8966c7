"""Tests of k2train/config."""
