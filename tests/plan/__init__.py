"""Tests of k2train/plan."""
