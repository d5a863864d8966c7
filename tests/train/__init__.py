"""Tests of k2train/train."""
