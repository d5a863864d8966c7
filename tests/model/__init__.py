"""Tests of k2train/model."""
