"""Tests of k2train/planner."""
