"""Tests of k2train/hf."""
