"""Tests of k2train/run_lock."""
