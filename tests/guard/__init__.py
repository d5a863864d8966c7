"""Tests of k2train/guard."""
